import numpy as np
import pandas as pd
import pytest
import torch

from src.utils.training import heldout


def test_a_sample_is_the_fold_itself_where_that_is_small(demo_pairs):
    pd.testing.assert_frame_equal(heldout.sample_groups(demo_pairs, 1000), demo_pairs)
    one = heldout.sample_groups(demo_pairs, 50)
    pd.testing.assert_frame_equal(one, heldout.sample_groups(demo_pairs, 50))
    assert 50 <= len(one) < 60


def test_logits_that_are_never_finite_stop_training_and_name_the_setting_to_lower(make_trainer):
    trainer = make_trainer(n_epochs=0.5)
    trainer.model.classifier.register_forward_hook(
        lambda module, inputs, outputs: outputs * torch.nan
    )
    with pytest.raises(
        FloatingPointError, match=r"fold_0.*8 of 8 held-out battles.*learning_rate \(0\.001\)"
    ):
        trainer.train()


def test_a_battle_without_finite_logits_gets_the_mean_of_the_others(make_trainer, monkeypatch):
    monkeypatch.setattr(heldout, "_MAX_LOST_SHARE", 0.2)
    trainer = make_trainer()
    real = heldout.predict_pairs

    def lose_one(*args, **options):
        prediction = real(*args, **options)
        prediction.probs[2] = prediction.first_probs[2] = prediction.swap_gap[2] = np.nan
        return prediction

    monkeypatch.setattr(heldout, "predict_pairs", lose_one)
    with pytest.warns(UserWarning, match="fold_0: 1 battles have no finite logits"):
        found = heldout.predict_heldout(
            trainer.reader, trainer.tokenizer, trainer.heldout, trainer.member
        )
    others = np.delete(found.probs, 2, axis=0).mean(axis=0)
    side = (others[0] + others[1]) / 2
    np.testing.assert_allclose(found.probs[2], [side, side, others[2]])
    np.testing.assert_allclose(found.first_probs[2], found.probs[2])
    assert np.isfinite(found.swap_gap)
