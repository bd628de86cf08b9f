"""Optimizers, their parameter groups, and the learning rate schedule.

Optimizer `adamw`: AdamW trains all parameters (Loshchilov and Hutter 2019).
Optimizer `muon`: Muon trains the hidden matrices (Jordan et al. 2024), and AdamW the other parameters.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon
from torch.optim.adamw import adamw

from compactgpt.config import Training

TOKENS, POSITIONS = "wte.weight", "wpe.weight"

RunSharded = Callable[[Sequence[Tensor], Callable[[Tensor], Tensor]], Sequence[Tensor]]
"""The type of the function `fsdp.orthogonalize_sharded`, which `optim` gets as an argument."""


def lr_multiplier(training: Training, step: int) -> float:
    """Return a step's learning rate, divided by the peak learning rate. `step` is counted from 0.

    After the warm-up, the schedules `cosine` and `linear` fall from 1 to min_lr_ratio at step max_steps. The
    schedule `constant` stays at 1. The schedule `wsd` stays at 1 until the last decay_share of all steps, and
    then falls linearly to min_lr_ratio (Hu et al. 2024, MiniCPM).
    """
    if step < training.warmup_steps:
        return (step + 1) / (training.warmup_steps + 1)  # a linear warm-up, as in nanoGPT
    if training.schedule == "constant":
        return 1.0
    start = training.warmup_steps
    if training.schedule == "wsd":
        start = max(start, round(training.max_steps * (1 - training.decay_share)))
    done = max(0.0, (step - start) / max(1, training.max_steps - start))
    left = 0.5 * (1 + math.cos(math.pi * done)) if training.schedule == "cosine" else 1 - done
    return training.min_lr_ratio + left * (1 - training.min_lr_ratio)


@torch.no_grad()
def muon_step(muon: Muon, run_sharded: RunSharded | None = None) -> None:
    """Make one step of Muon. Stack matrices of the same shape, for batched products.

    `run_sharded` is `fsdp.orthogonalize_sharded` if the model is sharded, otherwise None. The operations are
    those of torch.optim.Muon with adjust_lr_fn="original".
    """
    for group in muon.param_groups:
        shapes: dict[torch.Size, list[Tensor]] = {}
        for parameter in group["params"]:
            shapes.setdefault(parameter.shape, []).append(parameter)
        orthogonalize = partial(
            newton_schulz, coefficients=group["ns_coefficients"], steps=group["ns_steps"], eps=group["eps"]
        )
        for shape, parameters in shapes.items():
            grads = [cast(Tensor, parameter.grad) for parameter in parameters]
            buffers = [muon.state[parameter]["momentum_buffer"] for parameter in parameters]
            torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
            lookahead = torch._foreach_lerp(grads, buffers, group["momentum"])
            if run_sharded:
                updates = run_sharded(lookahead, orthogonalize)
            else:
                updates = list(orthogonalize(torch.stack(lookahead)))  # (count, rows, columns)
            rate = group["lr"] * math.sqrt(max(1, shape[0] / shape[1]))
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(parameters, [update.float() for update in updates], alpha=-rate)


def newton_schulz(
    matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """Return the matrices with all singular values moved towards 1 (Jordan et al. 2024).

    Each step replaces a singular value s by a s + b s^3 + c s^5, where (a, b, c) are the coefficients.
    (count, rows, columns) -> the same shape.
    """
    a, b, c = coefficients
    # A CPU without bfloat16 instructions needs ten times as long in bfloat16 (docs/benchmarks.md).
    x = matrices.float() if matrices.device.type == "cpu" else matrices.bfloat16()
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = x.mT if is_tall else x  # rows <= columns, so that the Gram matrix is the smaller one
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT  # (count, rows, rows)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b gram + c gram^2
        x = torch.baddbmm(x, polynomial, x, beta=a)  # a x + polynomial x
    return x.mT if is_tall else x


class EmbeddingRows(NamedTuple):
    """The rows of the token embedding that one step with a sampled softmax trains."""

    ids: Tensor  # (K,) int64, all different
    values: nn.Parameter  # (K, C) a copy of the rows, which gets the gradient


class Optimizers:
    """All optimizers of one model: AdamW and, if configured, Muon.

    `state` maps names to the state tensors of all optimizers. `run_sharded` is `fsdp.orthogonalize_sharded`
    if the model is sharded, otherwise None.
    """

    def __init__(self, model: nn.Module, training: Training, run_sharded: RunSharded | None = None) -> None:
        self.training, self.run_sharded = training, run_sharded
        self.parameters = dict(model.named_parameters())
        self.adamw = AdamW(
            self._adamw_groups(),
            betas=(training.beta1, training.beta2),
            fused=True,  # one pass over parameter, gradient and both moments
        )
        matrices = [parameter for name, parameter in self.parameters.items() if self._is_muon(name)]
        self.muon = Muon(matrices, weight_decay=training.weight_decay) if matrices else None
        self.rows: EmbeddingRows | None = None  # token embeddings that the next update trains; None: all
        # Pairs of a parameter group and its peak learning rate.
        self._peaks = [(group, group["lr"]) for group in self.adamw.param_groups]
        if self.muon:
            self._peaks += [(group, training.muon_learning_rate) for group in self.muon.param_groups]
        self.state = self._init_state()

    def _is_muon(self, name: str) -> bool:
        is_hidden_matrix = self.parameters[name].dim() == 2 and name not in (TOKENS, POSITIONS)
        return self.training.optimizer == "muon" and is_hidden_matrix

    def _adamw_groups(self) -> list[dict[str, Any]]:
        """Return AdamW's parameter groups; the first group is the token embedding."""
        training = self.training
        # By default, position embeddings have the learning rate of the token embeddings.
        position_lr = training.position_learning_rate or training.embedding_learning_rate
        others = {name: p for name, p in self.parameters.items() if name not in (TOKENS, POSITIONS)}
        hidden = [p for name, p in others.items() if p.dim() >= 2 and not self._is_muon(name)]
        vectors = [p for p in others.values() if p.dim() < 2]
        decay = training.weight_decay
        groups: list[tuple[list[Any], float, float]] = [
            ([self.parameters[TOKENS]], training.embedding_learning_rate, decay),
            ([self.parameters[POSITIONS]], position_lr, decay),
            (hidden, training.learning_rate, decay),
            (vectors, training.learning_rate, 0.0),  # no weight decay, as in nanoGPT
        ]
        return [{"params": p, "lr": lr, "weight_decay": decay} for p, lr, decay in groups if p]

    def _init_state(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            if self.muon and self._is_muon(name):
                kind, state = "muon", self.muon.state[parameter]
                state["momentum_buffer"] = torch.zeros_like(parameter)
            else:
                kind, state = "adamw", self.adamw.state[parameter]
                state["step"] = torch.zeros((), device=parameter.device)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
            tensors |= {f"{kind}.{key}.{name}": tensor for key, tensor in state.items()}
        return tensors

    def select_rows(self, ids: Tensor) -> nn.Parameter:
        """Select the rows of the token embedding to train; return a copy for the forward pass, (K, C)."""
        values = nn.Parameter(self.parameters[TOKENS].detach().index_select(0, ids))
        self.rows = EmbeddingRows(ids, values)
        return values

    def trained_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that get a gradient.

        After a call of `select_rows`, the list has the returned rows, but not the whole token embedding.
        """
        rows = {TOKENS: self.rows.values} if self.rows else {}
        return list({**self.parameters, **rows}.values())

    def grad_norm(self) -> Tensor:
        """Return the Euclidean norm of the gradient, a scalar on the gradient's device."""
        grads = [p.grad for p in self.trained_parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        # The norm of sharded gradients is a DTensor, to be combined over the processes.
        return cast(Tensor, norm.full_tensor()) if hasattr(norm, "full_tensor") else norm

    @torch.no_grad()
    def update(self, step: int, grad_norm: Tensor) -> None:
        """Clip the gradient to training.grad_clip, update the weights, and clear the gradient.

        The learning rate depends on `step`, counted from 0.
        """
        multiplier = lr_multiplier(self.training, step)
        for group, peak in self._peaks:
            group["lr"] = peak * multiplier
        divisor = self._clip_divisor(grad_norm)
        # The fused kernel divides the gradient by grad_scale, which saves a separate pass.
        self.adamw.grad_scale = divisor  # type: ignore[attr-defined]
        self.adamw.step()
        if self.rows:
            self._update_rows(self.rows, divisor)
            self.rows = None
        if self.muon:
            if divisor is not None:
                grads = [p.grad for group in self.muon.param_groups for p in group["params"]]
                torch._foreach_div_(grads, divisor)
            muon_step(self.muon, self.run_sharded)
        for parameter in self.parameters.values():
            parameter.grad = None

    def _update_rows(self, rows: EmbeddingRows, divisor: Tensor | None) -> None:
        """Update some rows of the token embedding with AdamW; the other rows stay unchanged.

        The moments of the other rows also stay unchanged, as in torch.optim.SparseAdam. The bias correction
        of each row counts all updates of the token embedding, also those that did not change this row.
        """
        parameter, group = self.parameters[TOKENS], self.adamw.param_groups[0]
        state = self.adamw.state[parameter]
        matrices = [parameter, state["exp_avg"], state["exp_avg_sq"]]  # 3 x (V, C)
        exp_avg, exp_avg_sq = (moment.index_select(0, rows.ids) for moment in matrices[1:])  # 2 x (K, C)
        values, grad = rows.values.detach(), cast(Tensor, rows.values.grad)
        beta1, beta2 = group["betas"]
        adamw(
            [values], [grad], [exp_avg], [exp_avg_sq], [], [state["step"]],
            fused=True, grad_scale=divisor, amsgrad=False, maximize=False,
            beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
        )  # fmt: skip
        for matrix, updated in zip(matrices, [values, exp_avg, exp_avg_sq], strict=True):
            matrix.index_copy_(0, rows.ids, updated)

    def _clip_divisor(self, grad_norm: Tensor) -> Tensor | None:
        """Return the number by which the gradient must be divided to clip it; None means no division."""
        if not self.training.grad_clip:
            return None
        divisor = ((grad_norm + 1e-6) / self.training.grad_clip).clamp_min(1.0)
        # Skip a division by 1, but only on a CPU: on a GPU, `item()` waits for all queued kernels.
        if divisor.device.type == "cpu" and divisor.item() == 1:
            return None
        return divisor
