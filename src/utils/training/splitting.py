"""A Trainer that goes on where memory runs out: the batch is read in parts, and the step is the same."""

import warnings

import torch
from torch import nn

from src.utils.training.processes import RankedTrainer, world_size


class SplittingTrainer(RankedTrainer):
    """Halves its batches when memory does not hold one, as often as it takes, and from then on.

    The loss is a sum over rows, so the gradients of the parts add up to that of the
    batch. A failed step is taken again from its first batch, with the same random
    numbers, because part of its gradients may have been counted. One who inherits
    sets `plan`, `batches_per_step`, `rows_together` and `loss_sum`, and writes `_collate`.
    """

    plan: list[list[int]]  # rows of each batch
    batches_per_step: int
    rows_together: int  # rows of a batch that no part may tear asunder, e.g. 2 for both orders
    loss_sum: torch.Tensor
    n_parts = 1
    _step = -1

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """Add the gradients of one batch."""
        if self.state.global_step != self._step:
            self._begin_step()
        self._n_begun += 1
        try:
            if self.n_parts == 1:
                return super().training_step(model, inputs, num_items_in_batch)
            return self._read_parts(model, self._n_begun - 1)
        except torch.OutOfMemoryError as error:
            said = str(error)  # the error itself would hold on to the memory of the failed pass
        del inputs
        return self._take_again(model, said)

    def _begin_step(self) -> None:
        self._step, self._n_begun = self.state.global_step, 0
        self._loss_sum_before = self.loss_sum.clone()
        self._dice = (
            torch.get_rng_state(),
            torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        )

    def _take_again(self, model: nn.Module, said: str) -> torch.Tensor:
        while True:
            self._halve(said)
            model.zero_grad()
            self.loss_sum = self._loss_sum_before.clone()
            torch.set_rng_state(self._dice[0])
            if self._dice[1]:
                torch.cuda.set_rng_state_all(self._dice[1])
                torch.cuda.empty_cache()
            try:
                return [self._read_parts(model, place) for place in range(self._n_begun)][-1]
            except torch.OutOfMemoryError as error:
                said = str(error)

    def _halve(self, said: str) -> None:
        if world_size() > 1:  # the others wait for this pass, and would get another one
            raise RuntimeError(
                f"step {self._step}: memory does not hold a batch, and {world_size()} processes can not split theirs: "
                f"lower tokens_per_batch ({self.config.tokens_per_batch}) or turn on gradient_checkpointing. {said}"
            )
        largest = max(len(self._rows(place)) for place in range(self._n_begun))
        if self.n_parts * self.rows_together >= largest:
            raise torch.OutOfMemoryError(
                f"step {self._step}: memory does not hold a single battle; lower max_tokens "
                f"({self.config.max_tokens}) or turn on gradient_checkpointing. {said}"
            )
        self.n_parts *= 2
        warnings.warn(
            f"step {self._step}: memory does not hold a batch of {self.config.tokens_per_batch} tokens; from here on "
            f"each is read in {self.n_parts} parts, which changes no result but takes longer",
            stacklevel=4,
        )

    def _rows(self, place: int) -> list[int]:
        return self.plan[self._step * self.batches_per_step + place]

    def _read_parts(self, model: nn.Module, place: int) -> torch.Tensor:
        rows = self._rows(place)
        n_units = -(-len(rows) // self.rows_together)
        size = -(-n_units // self.n_parts) * self.rows_together
        losses = []
        for start in range(0, len(rows), size):
            inputs = self._collate([self.train_dataset[row] for row in rows[start : start + size]])
            losses.append(super().training_step(model, inputs))
        return torch.stack(losses).sum()
