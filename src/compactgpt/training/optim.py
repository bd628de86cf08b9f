"""Parameter groups, the optimizers that own them, and the learning rate as a function of the step.

`adamw`: AdamW for everything (Loshchilov and Hutter 2019), with nanoGPT's rule for weight decay: matrices
decay, vectors do not. `muon`: Muon for the hidden matrices (Jordan et al. 2024, torch.optim.Muon), AdamW for
the embeddings and the vectors. A schedule multiplies each group's own peak learning rate.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon
from torch.optim.adamw import adamw

from compactgpt.config import Training

TOKENS, POSITIONS = "wte.weight", "wpe.weight"

RunSharded = Callable[[Sequence[Tensor], Callable[[Tensor], Tensor]], Sequence[Tensor]]
"""Applies a function of full matrices, (count, rows, columns), to sharded matrices of one shape."""


def lr_multiplier(training: Training, step: int) -> float:
    """Return the learning rate of update number `step`, counted from 0, as a share of its peak.

    Warm-up is linear and nanoGPT's: (step + 1) / (warmup_steps + 1). After it `cosine` and `linear` fall
    to min_lr_ratio at max_steps, `wsd` stays at 1 and falls linearly in the last decay_share of max_steps
    (Hu et al. 2024, MiniCPM), `constant` stays at 1.
    """
    if step < training.warmup_steps:
        return (step + 1) / (training.warmup_steps + 1)
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
    """Do what `muon.step` does, with all matrices of one shape in the same products.

    Momentum, Nesterov's lookahead, orthogonalization, decoupled decay and the learning rate's adjustment to
    the shape are torch.optim.Muon's ("original"), in its order.

    Args:
        muon: its matrices have gradients.
        run_sharded: orthogonalizes matrices that are sharded over processes.
    """
    for group in muon.param_groups:
        shapes: dict[torch.Size, list[Tensor]] = {}
        for parameter in group["params"]:
            shapes.setdefault(parameter.shape, []).append(parameter)
        orthogonalize = partial(
            newton_schulz, coefficients=group["ns_coefficients"], steps=group["ns_steps"], eps=group["eps"]
        )
        # Small matrices one after the other would wait for each call: one batched product is faster.
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
    """Move all singular values towards 1 by Newton-Schulz steps (Jordan et al. 2024).

    Args:
        matrices: of one shape. (count, rows, columns)
        coefficients: of x, x^3 and x^5.
        steps: number of steps.
        eps: smallest norm to divide by.

    Returns:
        (count, rows, columns)
    """
    a, b, c = coefficients
    # torch.optim.Muon computes in bfloat16; a CPU without instructions for it takes ten times as long
    # (docs/benchmarks.md).
    x = matrices.float() if matrices.device.type == "cpu" else matrices.bfloat16()
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = x.mT if is_tall else x  # rows <= columns, so that the Gram matrix is the smaller one
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT  # (count, rows, rows)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b gram + c gram^2
        x = torch.baddbmm(x, polynomial, x, beta=a)  # a x + polynomial x
    return x.mT if is_tall else x


@dataclass(frozen=True)
class EmbeddingRows:
    """Rows of the token embedding that one step trains instead of all."""

    ids: Tensor  # (K,) int64, all different
    values: nn.Parameter  # (K, C) a copy, which gets the gradient


@torch.no_grad()
def adamw_rows(optimizer: AdamW, parameter: Tensor, rows: EmbeddingRows, grad_scale: Tensor | None) -> None:
    """Make AdamW's update of some rows of a matrix ("lazy", as torch.optim.SparseAdam is).

    The other rows keep their weights and both moments: moments do not decay, and weight decay does not act.
    The correction of the moments' bias counts all steps of the optimizer, not those of a row. With all rows
    this is the optimizer's own step, to the bit.

    Args:
        optimizer: its settings and state are used; the matrix is one of its parameters.
        parameter: (V, C)
        rows: of this step, with their gradient.
        grad_scale: the gradient is divided by it. ()
    """
    group = next(group for group in optimizer.param_groups if any(p is parameter for p in group["params"]))
    state = optimizer.state[parameter]
    matrices = [parameter, state["exp_avg"], state["exp_avg_sq"]]  # 3 x (V, C)
    exp_avg, exp_avg_sq = (moment.index_select(0, rows.ids) for moment in matrices[1:])  # 2 x (K, C)
    values, grad = rows.values.detach(), cast(Tensor, rows.values.grad)
    beta1, beta2 = group["betas"]
    adamw(
        [values], [grad], [exp_avg], [exp_avg_sq], [], [state["step"]],
        fused=True, grad_scale=grad_scale, amsgrad=False, maximize=False,
        beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
    )  # fmt: skip
    for matrix, updated in zip(matrices, [values, exp_avg, exp_avg_sq], strict=True):
        matrix.index_copy_(0, rows.ids, updated)


class Optimizers:
    """The optimizers of one model: built, scheduled and stepped together.

    Attributes:
        state: all tensors that the next update depends on besides the weights, by name; zeros at the start.
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
        self.rows: EmbeddingRows | None = None  # of the next update, if it trains only some
        self._peaks = [(group, group["lr"]) for group in self.adamw.param_groups]
        if self.muon:
            self._peaks += [(group, training.muon_learning_rate) for group in self.muon.param_groups]
        self.state = self._init_state()

    def _is_muon(self, name: str) -> bool:
        is_hidden_matrix = self.parameters[name].dim() == 2 and name not in (TOKENS, POSITIONS)
        return self.training.optimizer == "muon" and is_hidden_matrix

    def _adamw_groups(self) -> list[dict[str, Any]]:
        """Return AdamW's parameters by learning rate and weight decay."""
        training = self.training
        # Without a rate of their own, position embeddings have that of the token embeddings.
        position_lr = training.position_learning_rate or training.embedding_learning_rate
        embedding = {"params": [self.parameters[TOKENS]], "lr": training.embedding_learning_rate}
        position = {"params": [self.parameters[POSITIONS]], "lr": position_lr}
        others = {name: p for name, p in self.parameters.items() if name not in (TOKENS, POSITIONS)}
        hidden = [p for name, p in others.items() if p.dim() >= 2 and not self._is_muon(name)]
        vectors = [p for p in others.values() if p.dim() < 2]
        decaying = [embedding, position, {"params": hidden, "lr": training.learning_rate}]
        groups = [{**group, "weight_decay": training.weight_decay} for group in decaying]
        groups.append({"params": vectors, "lr": training.learning_rate, "weight_decay": 0.0})
        return [group for group in groups if group["params"]]

    def _init_state(self) -> dict[str, Tensor]:
        """Create what the optimizers' first steps would create, so that a checkpoint can fill it."""
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
        """Make the next update train these rows of the token embedding only, and return a copy of them.

        Args:
            ids: (K,) int64, all different.

        Returns:
            The forward pass must use it, so that it gets the gradient. (K, C)
        """
        values = nn.Parameter(self.parameters[TOKENS].detach().index_select(0, ids))
        self.rows = EmbeddingRows(ids, values)
        return values

    def trained_parameters(self) -> list[nn.Parameter]:
        """Return what the next update changes: all parameters, or selected rows instead of the embedding."""
        rows = {TOKENS: self.rows.values} if self.rows else {}
        return list({**self.parameters, **rows}.values())

    def grad_norm(self) -> Tensor:
        """Return the Euclidean norm of the gradient, on its device: nothing waits for a GPU. ()."""
        grads = [p.grad for p in self.trained_parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        # the norm of sharded gradients is sharded, too
        return cast(Tensor, norm.full_tensor()) if hasattr(norm, "full_tensor") else norm

    @torch.no_grad()
    def update(self, step: int, grad_norm: Tensor) -> None:
        """Clip the gradient to training.grad_clip, make update number `step`, and clear the gradient."""
        multiplier = lr_multiplier(self.training, step)
        for group, peak in self._peaks:
            group["lr"] = peak * multiplier
        divisor = self._clip_divisor(grad_norm)
        # The fused kernel divides by it in the pass that it makes anyway.
        self.adamw.grad_scale = divisor  # type: ignore[attr-defined]
        self.adamw.step()
        if self.rows:
            adamw_rows(self.adamw, self.parameters[TOKENS], self.rows, divisor)
            self.rows = None
        if self.muon:
            if divisor is not None:
                grads = [p.grad for group in self.muon.param_groups for p in group["params"]]
                torch._foreach_div_(grads, divisor)
            muon_step(self.muon, self.run_sharded)
        for parameter in self.parameters.values():
            parameter.grad = None

    def _clip_divisor(self, grad_norm: Tensor) -> Tensor | None:
        """Return what torch.nn.utils.clip_grad_norm_ divides the gradient by, None for nothing. ()."""
        if not self.training.grad_clip:
            return None
        divisor = ((grad_norm + 1e-6) / self.training.grad_clip).clamp_min(1.0)
        if divisor.device.type == "cpu" and divisor.item() == 1:
            return None  # a CPU skips the division; asking a GPU would wait for it, so it divides by 1
        return divisor
