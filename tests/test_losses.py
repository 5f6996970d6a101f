import pytest
import torch

from src.utils.training.losses import order_divergence


def mirrored(logits):
    return torch.stack([logits, logits[:, [1, 0, 2]]], dim=1).flatten(0, 1)


def test_a_symmetric_model_has_no_divergence():
    logits = mirrored(torch.randn(5, 3))
    assert order_divergence(logits).abs().max() < 1e-6


def test_a_model_that_sees_the_positions_has_some_wherever_it_does():
    logits = mirrored(torch.randn(5, 3))
    logits[4, 0] += 1  # battle 2, as given
    divergence = order_divergence(logits)
    assert divergence[2] > 0.01 and divergence[[0, 1, 3, 4]].abs().max() < 1e-6
    # A constant preference for position A is the most plain of all.
    assert order_divergence(torch.tensor([[2.0, 0.0, 0.0]] * 2)) > 0.5


def test_it_is_the_mean_of_both_divergences_and_does_not_depend_on_which_order_comes_first():
    logits = torch.randn(8, 3, dtype=torch.float64)
    one, other = logits[0::2].softmax(1), logits[1::2].softmax(1)[:, [1, 0, 2]]
    kl = [(p * (p / q).log()).sum(1) for p, q in ((one, other), (other, one))]
    torch.testing.assert_close(
        order_divergence(logits).double(), (kl[0] + kl[1]) / 2, atol=1e-6, rtol=0
    )
    exchanged = logits.reshape(4, 2, 3).flip(1).reshape(8, 3)
    torch.testing.assert_close(order_divergence(exchanged), order_divergence(logits))


def test_certain_logits_give_finite_gradients():
    logits = torch.tensor([[1e4, -1e4, 0.0], [1e4, 0.0, -1e4]], requires_grad=True)
    order_divergence(logits).sum().backward()
    assert logits.grad.isfinite().all()


def test_a_row_without_its_other_order_is_refused():
    with pytest.raises(ValueError, match="expected both orders of each battle, got 3 rows"):
        order_divergence(torch.zeros(3, 3))
