"""Claims about the inference loop: symmetry, what is given up under a deadline, and memory."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from src.utils.config import DecoderConfig, FinetuneConfig
from src.utils.models import predict
from src.utils.models.checkpoints import load_classifier
from src.utils.models.predict import (
    PRECISION_TOLERANCE,
    choose_least_certain,
    measure_entropy,
    predict_pairs,
    predict_probs,
    reading_budget,
)
from src.utils.models.reading import LocalReader, ReaderLost
from src.utils.models.template import encode_battles
from src.utils.schema import average_over_swap, check_probs, swap_pairs, swap_probs

OPTIONS = {"max_tokens": 256, "tokens_per_batch": 2048}


@pytest.fixture(params=["modernbert", "qwen3"])
def loaded(request, tiny_base):
    config = FinetuneConfig(checkpoint=f"tiny:{request.param}", revision="")
    model, tokenizer = load_classifier(config, tiny_base(request.param))
    # A new head predicts nearly the same for all: make differences large enough to see.
    for name, parameter in model.named_parameters():
        if name.startswith(("classifier", "score")):
            nn.init.normal_(parameter, std=0.5)
    return model, tokenizer


def test_rows_are_probabilities_and_differ(loaded, demo_pairs):
    probs = check_probs(
        predict_probs(*loaded, demo_pairs[:20], **OPTIONS), n_pairs=20, tolerance=1e-9
    )
    assert probs.dtype == np.float64
    assert probs.std(axis=0).min() > 1e-4


def test_batch_size_row_order_and_padding_change_nothing(loaded, demo_pairs, ugly_pairs):
    pairs = demo_pairs[:24]
    probs = predict_probs(*loaded, pairs, **OPTIONS)
    alone = predict_probs(*loaded, pairs, max_tokens=256, tokens_per_batch=1)
    order = np.random.default_rng(0).permutation(24)
    shuffled = predict_probs(*loaded, pairs.iloc[order], **OPTIONS)
    few = predict_probs(*loaded, pairs[:3], **OPTIONS)
    np.testing.assert_allclose(alone, probs, atol=1e-5)
    np.testing.assert_allclose(shuffled, probs[order], atol=1e-5)
    np.testing.assert_allclose(few, probs[:3], atol=1e-5)


def test_exchanging_the_answers_exchanges_the_columns(loaded, demo_pairs, ugly_pairs):
    for pairs in (demo_pairs[:12], ugly_pairs):
        probs = predict_probs(*loaded, pairs, **OPTIONS)
        np.testing.assert_allclose(
            predict_probs(*loaded, swap_pairs(pairs), **OPTIONS), swap_probs(probs), atol=1e-6
        )


def test_the_swap_is_the_mean_of_both_readings(loaded, demo_pairs):
    pairs = demo_pairs[:12]
    given = predict_probs(*loaded, pairs, swap=False, **OPTIONS)
    swapped = predict_probs(*loaded, swap_pairs(pairs), swap=False, **OPTIONS)
    assert np.abs(given - swap_probs(swapped)).max() > 1e-3
    averaged = predict_probs(*loaded, pairs, **OPTIONS)
    np.testing.assert_allclose(averaged, average_over_swap(given, swapped), atol=1e-6)


def test_the_first_reading_is_that_of_the_canonical_order(loaded, demo_pairs):
    model, tokenizer = loaded
    pairs = demo_pairs[:12]
    reader = LocalReader(model, tokenizer.pad_token_id)
    given = predict_probs(*loaded, pairs, swap=False, **OPTIONS)
    exchanged = predict_probs(*loaded, swap_pairs(pairs), swap=False, **OPTIONS)
    canonical = predict.is_canonical(pairs)
    assert 0 < canonical.sum() < 12
    prediction = predict_pairs(reader, tokenizer, pairs, **OPTIONS)
    expected = np.where(canonical[:, None], given, swap_probs(exchanged))
    np.testing.assert_allclose(prediction.first_probs, expected, atol=1e-6)
    once = predict_pairs(reader, tokenizer, pairs, swap=False, **OPTIONS)
    np.testing.assert_array_equal(once.first_probs, once.probs)
    unread = predict_pairs(reader, tokenizer, pairs, deadline=-1.0, **OPTIONS)
    assert np.isnan(unread.first_probs).all() and unread.first_probs.dtype == np.float64


def test_a_budget_of_zero_is_chosen_for_the_device(tokenizer, demo_pairs, monkeypatch):
    assert reading_budget(700, torch.device("cpu")) == 700
    on_gpu, on_cpu = (reading_budget(0, torch.device(name)) for name in ("cuda", "cpu"))
    assert on_gpu > on_cpu > 0
    budgets = []
    make_batches = predict.make_batches
    monkeypatch.setattr(
        predict,
        "make_batches",
        lambda lengths, budget: budgets.append(budget) or make_batches(lengths, budget),
    )
    probs = predict_probs(Fake(), tokenizer, demo_pairs, max_tokens=256, tokens_per_batch=0)
    assert np.isfinite(probs).all() and set(budgets) == {on_cpu}


def test_a_tolerance_is_that_of_the_precision(loaded, monkeypatch):
    model, _ = loaded
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        monkeypatch.setattr(predict, "choose_dtype", lambda device, width, dtype=dtype: dtype)
        assert predict.tolerance(FinetuneConfig(), model) == PRECISION_TOLERANCE[dtype]
        assert predict.tolerance(DecoderConfig(), model) == PRECISION_TOLERANCE[dtype]
    config = DecoderConfig(quantization="8bit")
    assert predict.tolerance(config, model) == max(PRECISION_TOLERANCE.values())


def test_no_battles_give_an_empty_array(loaded, demo_pairs):
    assert predict_probs(*loaded, demo_pairs[:0], **OPTIONS).shape == (0, 3)


def test_a_packed_batch_reads_as_a_padded_one(loaded):
    model, tokenizer = loaded
    rows = [np.arange(1, n) for n in (90, 3, 300, 41)]
    padded = LocalReader(model, tokenizer.pad_token_id, packing=False)
    packed = LocalReader(model, tokenizer.pad_token_id)
    assert packed.is_packed and not padded.is_packed
    np.testing.assert_allclose(packed.read(rows), padded.read(rows), atol=1e-6)


def test_the_model_keeps_its_mode(loaded, demo_pairs):
    model, tokenizer = loaded
    model.train()
    predict_probs(model, tokenizer, demo_pairs[:2], **OPTIONS)
    assert model.training


class Clock:
    """A clock that only the fake model moves."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(predict, "time", clock)
    return clock


class Fake(nn.Module):
    """Logits from the token ids; takes one second per padded token of the clock."""

    def __init__(self, clock=None, overflow_rows=0):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.clock, self.overflow_rows = clock or Clock(), overflow_rows

    def forward(self, input_ids, attention_mask):
        self.clock.now += input_ids.numel()
        position = torch.arange(input_ids.shape[1])
        place = (input_ids * attention_mask * position).sum(1).double()
        logits = torch.stack([torch.sin(place), torch.cos(place), torch.zeros_like(place)], dim=1)
        if len(input_ids) > 1:
            logits[: self.overflow_rows] = torch.nan
        return SimpleNamespace(logits=logits)


@pytest.fixture
def tokenizer(tiny_base):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_base("modernbert"))


def test_no_row_is_read_after_the_deadline(clock, tokenizer, demo_pairs):
    probs = predict_probs(Fake(clock), tokenizer, demo_pairs[:5], deadline=-1.0, **OPTIONS)
    assert probs.shape == (5, 3) and np.isnan(probs).all()


def test_a_deadline_that_is_far_away_changes_nothing(clock, tokenizer, demo_pairs):
    expected = predict_probs(Fake(clock), tokenizer, demo_pairs, **OPTIONS)
    hurried = predict_probs(Fake(clock), tokenizer, demo_pairs, deadline=2 * clock.now, **OPTIONS)
    np.testing.assert_array_equal(hurried, expected)


@pytest.mark.parametrize(
    ("share", "all_reached"), [(0.75, True), (0.5, True), (0.25, False), (0.05, False)]
)
def test_second_readings_are_given_up_before_any_row_and_the_deadline_holds(
    clock, tokenizer, demo_pairs, share, all_reached
):
    complete = predict_probs(Fake(clock), tokenizer, demo_pairs, **OPTIONS)
    seconds, clock.now = clock.now, 0.0
    probs = predict_probs(Fake(clock), tokenizer, demo_pairs, deadline=share * seconds, **OPTIONS)
    assert clock.now <= share * seconds
    reached = np.isfinite(probs).all(axis=1)
    assert reached.all() == all_reached and reached.any()
    np.testing.assert_allclose(probs[reached].sum(axis=1), 1)
    # Some were read once, which is not the mean of two readings.
    assert np.abs(probs - complete)[reached].max() > 0.01
    # Nearly all of the time is used.
    assert clock.now > share * seconds - 2 * OPTIONS["tokens_per_batch"]


def test_second_readings_go_to_the_battles_that_the_first_left_least_certain(
    clock, tokenizer, demo_pairs
):
    first = predict_probs(Fake(clock), tokenizer, demo_pairs, swap=False, **OPTIONS)
    seconds, clock.now = clock.now, 0.0
    prediction = predict_pairs(
        LocalReader(Fake(clock), 0), tokenizer, demo_pairs, deadline=1.5 * seconds, **OPTIONS
    )
    assert clock.now <= 1.5 * seconds
    canonical = predict.is_canonical(demo_pairs)
    swapped = predict_probs(Fake(clock), tokenizer, swap_pairs(demo_pairs), swap=False, **OPTIONS)
    entropy = measure_entropy(np.where(canonical[:, None], first, swapped))
    twice = prediction.n_readings == 2
    assert 0.3 < twice.mean() < 0.7
    # A more certain battle comes first only where the last bit of time fits no longer one.
    assert np.median(entropy[twice]) > np.median(entropy[~twice])
    least_certain = entropy >= np.quantile(entropy, 1 - twice.mean())
    assert (twice == least_certain).mean() > 0.95


def test_the_most_certain_battles_are_given_up_first(clock, tokenizer, demo_pairs):
    uncertainty = np.random.default_rng(0).permutation(len(demo_pairs)).astype(float)
    predict_probs(Fake(clock), tokenizer, demo_pairs, swap=False, **OPTIONS)
    seconds, clock.now = clock.now, 0.0
    prediction = predict_pairs(
        LocalReader(Fake(clock), 0),
        tokenizer,
        demo_pairs,
        deadline=0.4 * seconds,
        uncertainty=uncertainty,
        **OPTIONS,
    )
    assert clock.now <= 0.4 * seconds
    reached = prediction.n_readings > 0
    assert 0.2 < reached.mean() < 0.8
    assert uncertainty[reached].mean() > uncertainty[~reached].mean() + 50


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_the_share_that_is_read_twice_is_the_least_certain(tokenizer, demo_pairs, share):
    once = predict_pairs(LocalReader(Fake(), 0), tokenizer, demo_pairs, twice_share=0.0, **OPTIONS)
    prediction = predict_pairs(
        LocalReader(Fake(), 0), tokenizer, demo_pairs, twice_share=share, **OPTIONS
    )
    twice = (prediction.n_readings == 2) & (once.n_readings == 1)
    assert abs(twice.sum() - share * len(demo_pairs)) <= (once.n_readings == 2).sum()
    if twice.any():
        entropy = measure_entropy(once.probs)
        assert entropy[twice].min() >= entropy[prediction.n_readings == 1].max()


def test_what_was_given_up_is_read_where_time_is_left_after_all(clock, tokenizer, demo_pairs):
    class SpeedingUp(Fake):
        def forward(self, input_ids, attention_mask):
            self.n_calls = getattr(self, "n_calls", 0) + 1
            if self.n_calls > 12:
                clock.now -= 0.9 * input_ids.numel()
            return super().forward(input_ids, attention_mask)

    predict_probs(Fake(clock), tokenizer, demo_pairs, **OPTIONS)
    seconds, clock.now = clock.now, 0.0
    prediction = predict_pairs(
        LocalReader(SpeedingUp(clock), 0), tokenizer, demo_pairs, deadline=0.4 * seconds, **OPTIONS
    )
    assert (prediction.n_readings == 2).all() and clock.now <= 0.4 * seconds


def test_entropy_is_in_nats_and_what_is_unknown_comes_last():
    probs = np.array([[1 / 3, 1 / 3, 1 / 3], [1.0, 0.0, 0.0], [np.nan] * 3])
    np.testing.assert_allclose(measure_entropy(probs), [np.log(3), 0.0, -np.inf], atol=1e-12)
    assert choose_least_certain(measure_entropy(probs), 0.34).tolist() == [0, 1]
    assert choose_least_certain(np.zeros(0), 0.5).tolist() == []


def test_a_single_reading_is_symmetric_too(clock, tokenizer, demo_pairs, ugly_pairs):
    for pairs in (demo_pairs[:40], ugly_pairs):
        clock.now = 0.0
        predict_probs(Fake(clock), tokenizer, pairs, swap=False, **OPTIONS)
        seconds = clock.now
        readings = []
        for table in (pairs, swap_pairs(pairs)):
            clock.now = 0.0
            readings.append(
                predict_probs(Fake(clock), tokenizer, table, deadline=seconds, **OPTIONS)
            )
            assert clock.now == seconds
        np.testing.assert_allclose(readings[1], swap_probs(readings[0]), atol=1e-12)
        assert np.isfinite(readings[0]).all()


def test_rows_that_overflow_are_read_again_alone(tokenizer, demo_pairs):
    pairs = demo_pairs[:30]
    lost = predict_probs(Fake(overflow_rows=2), tokenizer, pairs, **OPTIONS)
    np.testing.assert_allclose(lost, predict_probs(Fake(), tokenizer, pairs, **OPTIONS), atol=1e-12)


LONG = {"max_tokens": 1024, "tokens_per_batch": 2048}


@pytest.fixture
def long_pairs(demo_pairs):
    """A hundred battles of some 600 tokens each."""
    pairs = demo_pairs[:100].reset_index(drop=True)
    pairs["response_a"] = [(" ".join([turns[0] or "x"] * 8),) for turns in pairs["response_a"]]
    return pairs


@pytest.mark.parametrize("share", [1.0, 0.8, 0.65])
def test_time_too_short_for_one_reading_costs_length_and_no_row(
    clock, tokenizer, long_pairs, share
):
    predict_probs(Fake(clock), tokenizer, long_pairs, swap=False, **LONG)
    seconds, clock.now = clock.now, 0.0
    prediction = predict_pairs(
        LocalReader(Fake(clock), 0), tokenizer, long_pairs, deadline=share * seconds * 1.02, **LONG
    )
    assert clock.now <= share * seconds * 1.02
    assert np.isfinite(prediction.probs).all()
    assert prediction.is_cut.any() == (share < 1)
    assert prediction.n_readings.min() == 1


def test_length_is_given_up_only_after_second_readings(clock, tokenizer, long_pairs):
    predict_probs(Fake(clock), tokenizer, long_pairs, **LONG)
    seconds, clock.now = clock.now, 0.0
    prediction = predict_pairs(
        LocalReader(Fake(clock), 0), tokenizer, long_pairs, deadline=0.7 * seconds, **LONG
    )
    assert not prediction.is_cut.any()
    assert set(prediction.n_readings) == {1, 2}


def test_a_falling_pace_is_noticed(clock, tokenizer, long_pairs):
    class SlowingDown(Fake):
        def forward(self, input_ids, attention_mask):
            self.n_calls = getattr(self, "n_calls", 0) + 1
            clock.now += (
                input_ids.numel() if self.n_calls > 6 else 0
            )  # half as fast from the seventh batch on
            return super().forward(input_ids, attention_mask)

    predict_probs(Fake(clock), tokenizer, long_pairs, swap=False, **LONG)
    seconds, clock.now = clock.now, 0.0
    prediction = predict_pairs(
        LocalReader(SlowingDown(clock), 0), tokenizer, long_pairs, deadline=1.5 * seconds, **LONG
    )
    assert prediction.is_cut.any() and np.isfinite(prediction.probs).all(axis=1).mean() > 0.8
    assert clock.now <= 1.5 * seconds + LONG["tokens_per_batch"]


def test_the_prediction_so_far_is_handed_over_each_minute(clock, tokenizer, demo_pairs):
    kept = []
    predict_pairs(
        LocalReader(Fake(clock), 0), tokenizer, demo_pairs[:60], keep=kept.append, **OPTIONS
    )
    n_reached = [np.isfinite(prediction.probs).all(axis=1).sum() for prediction in kept]
    assert len(kept) > 5 and n_reached == sorted(n_reached) and n_reached[0] < 60
    assert kept[-1].n_readings.sum() > kept[0].n_readings.sum()


@pytest.mark.parametrize("n_rows_in_memory", [1, 3])
def test_a_batch_that_does_not_fit_into_memory_is_halved(tokenizer, demo_pairs, n_rows_in_memory):
    class Small(Fake):
        def forward(self, input_ids, attention_mask):
            if len(input_ids) > n_rows_in_memory:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(input_ids, attention_mask)

    pairs = demo_pairs[:30]
    probs = predict_probs(Small(), tokenizer, pairs, **OPTIONS)
    np.testing.assert_allclose(
        probs, predict_probs(Fake(), tokenizer, pairs, **OPTIONS), atol=1e-12
    )


def test_a_row_that_does_not_fit_into_memory_is_nan_and_the_others_are_not(tokenizer, demo_pairs):
    lengths = encode_battles(demo_pairs[:30], tokenizer, 256).lengths.tolist()

    class Small(Fake):
        def forward(self, input_ids, attention_mask):
            if input_ids.shape[1] > sorted(lengths)[-2]:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(input_ids, attention_mask)

    probs = predict_probs(Small(), tokenizer, demo_pairs[:30], **OPTIONS)
    assert np.flatnonzero(np.isnan(probs).any(axis=1)).tolist() == [int(np.argmax(lengths))]


def test_a_size_that_did_not_fit_into_memory_is_not_tried_again(tokenizer, demo_pairs):
    tried = []

    class Small(Fake):
        def forward(self, input_ids, attention_mask):
            tried.append(tuple(input_ids.shape))
            if input_ids.numel() > 1000:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(input_ids, attention_mask)

    reader = LocalReader(Small(), 0)
    rows = [np.arange(1, 101)] * 20
    reader.read(rows)  # 2,000 tokens, halved once
    assert tried == [(20, 100), (10, 100), (10, 100)]
    tried.clear()
    np.testing.assert_array_equal(reader.read(rows), reader.read(rows[:1]).repeat(20, axis=0))
    reader.read([np.arange(1, 201)] * 12)
    assert max(n_rows * n_tok for n_rows, n_tok in tried) < 2000
    # A single row cannot be split, so it is tried.
    assert np.isnan(reader.read([np.arange(1, 2001)])).all() and tried[-1] == (1, 2000)


def test_a_packed_size_is_that_of_its_tokens(loaded, monkeypatch):
    model, tokenizer = loaded
    reader, tried = LocalReader(model, tokenizer.pad_token_id), []

    def predict_few(rows):
        tried.append(sum(map(len, rows)))
        if tried[-1] > 150:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return np.full((len(rows), 3), 1 / 3)

    monkeypatch.setattr(reader, "_predict", predict_few)
    reader.read([np.arange(n) for n in (100, 50, 50, 50)])
    reader.read([np.arange(n) for n in (200, 40, 9)])
    # 3 rows of 249 tokens are fewer than the 250 that failed, though padded they are more.
    assert tried == [250, 150, 100, 249, 200, 49]


def test_a_retry_in_32_bit_that_memory_does_not_hold_costs_its_row_alone(tokenizer):
    class Small(Fake):
        def forward(self, input_ids, attention_mask):
            if len(input_ids) == 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(input_ids, attention_mask)

    reader = LocalReader(Small(overflow_rows=1), 0)
    for _ in range(2):
        probs = reader.read([np.arange(1, n) for n in (30, 20, 10)])
        assert np.isnan(probs).all(axis=1).tolist() == [True, False, False]


def test_what_was_read_before_the_reader_was_lost_is_kept(tokenizer, demo_pairs):
    class Dying(LocalReader):
        def send(self, key, rows):
            if key > 4:
                raise ReaderLost("a process ended with code -9")
            super().send(key, rows)

    prediction = predict_pairs(Dying(Fake(), 0), tokenizer, demo_pairs[:60], **OPTIONS)
    assert prediction.note == "a process ended with code -9"
    assert 0 < np.isfinite(prediction.probs).all(axis=1).sum() < 60


def test_rows_that_overflow_in_32_bit_too_are_nan(tokenizer, demo_pairs):
    model = Fake()
    model.forward = lambda input_ids, attention_mask: SimpleNamespace(
        logits=torch.full((len(input_ids), 3), torch.inf)
    )
    assert np.isnan(predict_probs(model, tokenizer, demo_pairs[:4], **OPTIONS)).all()
