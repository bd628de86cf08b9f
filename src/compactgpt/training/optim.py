"""Parameter groups, the optimizers that own them, and the learning rate as a function of the step.

`adamw`: AdamW for everything (Loshchilov and Hutter 2019), with nanoGPT's rule for weight decay: matrices
decay, vectors do not. `muon`: Muon for the hidden matrices (Jordan et al. 2024, torch.optim.Muon), AdamW for
the embeddings and the vectors. Schedules are multipliers of each group's own peak.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer
from torch.optim.adamw import adamw

from compactgpt.common.errors import BadData
from compactgpt.config import Training

POSITIONS = "wpe.weight"
EMBEDDINGS = {"wte.weight", POSITIONS}

ShareOut = Callable[[Sequence[Tensor], Callable[[Tensor], Tensor]], Sequence[Tensor]]
"""Applies what works on a stack of matrices to several of one shape."""


def lr_multiplier(training: Training, step: int) -> float:
    """Share of the peak learning rate that update number `step` uses, counted from 0.

    Warm-up is linear and nanoGPT's: (step + 1) / (warmup_steps + 1). After it `cosine` and `linear` fall
    to min_lr_ratio at max_steps, `wsd` stays at 1 and falls linearly in the last decay_share of max_steps
    (Hu et al. 2024, MiniCPM), `constant` stays at 1.
    """
    if step < training.warmup_steps:
        return (step + 1) / (training.warmup_steps + 1)
    if training.schedule == "constant":
        return 1.0
    begin = training.warmup_steps
    if training.schedule == "wsd":
        begin = max(begin, round(training.max_steps * (1 - training.decay_share)))
    done = max(0.0, (step - begin) / max(1, training.max_steps - begin))
    left = 0.5 * (1 + math.cos(math.pi * done)) if training.schedule == "cosine" else 1 - done
    return training.min_lr_ratio + left * (1 - training.min_lr_ratio)


@torch.no_grad()
def muon_step(muon: Muon, share_out: ShareOut | None = None) -> None:
    """Do what `muon.step` does, with all matrices of one shape in the same products: many small ones wait.

    Momentum, Nesterov's look ahead, orthogonalisation, decoupled decay and the learning rate's adjustment to
    the shape are torch.optim.Muon's ("original"), in its order.

    Args:
        muon: whose matrices have gradients.
        share_out: has matrices that are spread over processes orthogonalised there.
    """
    for group in muon.param_groups:
        shapes: dict[torch.Size, list[Tensor]] = {}
        for parameter in group["params"]:
            shapes.setdefault(parameter.shape, []).append(parameter)
        for shape, parameters in shapes.items():
            grads = [cast(Tensor, parameter.grad) for parameter in parameters]
            states = [muon.state[parameter] for parameter in parameters]
            for state, grad in zip(states, grads, strict=True):
                state.setdefault("momentum_buffer", torch.zeros_like(grad))
            buffers = [state["momentum_buffer"] for state in states]
            torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
            ahead = torch._foreach_lerp(grads, buffers, group["momentum"])
            make = partial(
                orthogonal, coefficients=group["ns_coefficients"], steps=group["ns_steps"], eps=group["eps"]
            )
            updates = share_out(ahead, make) if share_out else make(torch.stack(ahead))
            rate = group["lr"] * math.sqrt(max(1, shape[0] / shape[1]))
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(parameters, [update.float() for update in updates], alpha=-rate)


def orthogonal(matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Push all singular values towards 1 by Newton-Schulz steps (Jordan et al. 2024).

    In bfloat16, as torch.optim.Muon; on a CPU in fp32, since one without instructions for bfloat16 takes ten
    times as long for it (docs/benchmarks.md).

    Args:
        matrices: of one shape. (count, rows, columns)
        coefficients: of x, x^3 and x^5.
        steps: how many.
        eps: smallest norm to divide by.

    Returns:
        (count, rows, columns)
    """
    a, b, c = coefficients
    turned = matrices.shape[1] > matrices.shape[2]
    x = matrices.float() if matrices.device.type == "cpu" else matrices.bfloat16()
    x = x.mT if turned else x  # rows <= columns: the Gram matrix is the smaller one
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if turned else x


@dataclass(frozen=True)
class Rows:
    """Rows of the token embedding that one step trains in place of all of them."""

    ids: Tensor  # (K,) int64, all different
    values: nn.Parameter  # (K, C) a copy, whose gradient the backward pass makes


@torch.no_grad()
def adamw_rows(optimizer: AdamW, parameter: Tensor, rows: Rows, grad_scale: Tensor | None) -> None:
    """Make AdamW's update of some rows of a matrix ("lazy", as torch.optim.SparseAdam is).

    A row that is left out keeps its weights and both moments: moments do not decay, and weight decay does
    not act. The correction of the moments' bias counts all steps of the optimizer, not those of a row. With
    all rows this is the optimizer's own step, to the bit.

    Args:
        optimizer: whose settings and state are used; the matrix is one of its parameters.
        parameter: (V, C)
        rows: those of this step, with their gradient.
        grad_scale: what the gradient is divided by. ()
    """
    group = next(group for group in optimizer.param_groups if any(p is parameter for p in group["params"]))
    state = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), device=parameter.device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
    whole = [parameter, state["exp_avg"], state["exp_avg_sq"]]  # 3 x (V, C)
    moments = [tensor.index_select(0, rows.ids) for tensor in whole[1:]]  # 2 x (K, C)
    beta1, beta2 = group["betas"]
    adamw(
        [rows.values.detach()], [cast(Tensor, rows.values.grad)], [moments[0]], [moments[1]], [],
        [state["step"]], fused=True, grad_scale=grad_scale, amsgrad=False, maximize=False,
        beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
    )  # fmt: skip
    for tensor, part in zip(whole, [rows.values.detach(), *moments], strict=True):
        tensor.index_copy_(0, rows.ids, part)


class Optimizers:
    """The optimizers of one model: built, scheduled, stepped, saved and restored together."""

    def __init__(self, model: nn.Module, training: Training, share_out: ShareOut | None = None) -> None:
        self.training, self.share_out = training, share_out
        self.parameters = dict(model.named_parameters())
        self.adamw = AdamW(
            self._adamw_groups(),
            betas=(training.beta1, training.beta2),
            fused=True,  # one pass over parameter, gradient and both moments
        )
        matrices = [parameter for name, parameter in self.parameters.items() if self._is_muon(name)]
        self.muon = Muon(matrices, weight_decay=training.weight_decay) if matrices else None
        self.rows: Rows | None = None  # of the token embedding, where a step trains only some
        self._peaks = [(group, group["lr"]) for group in self.adamw.param_groups]
        if self.muon:
            self._peaks += [(group, training.muon_learning_rate) for group in self.muon.param_groups]

    def _is_muon(self, name: str) -> bool:
        hidden_matrix = self.parameters[name].dim() == 2 and name not in EMBEDDINGS
        return self.training.optimizer == "muon" and hidden_matrix

    def _adamw_groups(self) -> list[dict[str, Any]]:
        """AdamW's parameters by what they need: embeddings, other matrices, vectors."""
        own = {name: p for name, p in self.parameters.items() if not self._is_muon(name)}
        position_lr = self.training.position_learning_rate
        positions = [self.parameters[POSITIONS]] if position_lr else []
        embeddings = [
            p for name, p in own.items() if name in EMBEDDINGS - ({POSITIONS} if positions else set())
        ]
        matrices = [p for name, p in own.items() if name not in EMBEDDINGS and p.dim() >= 2]
        vectors = [p for p in own.values() if p.dim() < 2]
        lr, decay = self.training.learning_rate, self.training.weight_decay
        groups: list[dict[str, Any]] = [
            {"params": embeddings, "lr": self.training.embedding_learning_rate, "weight_decay": decay},
            {"params": positions, "lr": position_lr, "weight_decay": decay},
            {"params": matrices, "lr": lr, "weight_decay": decay},
            {"params": vectors, "lr": lr, "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def select_rows(self, ids: Tensor) -> nn.Parameter:
        """Have the next update train these rows of the token embedding only, and return a copy of them.

        Args:
            ids: (K,) int64, all different.

        Returns:
            What the forward pass must use, so that the gradient arrives there. (K, C)
        """
        values = nn.Parameter(self.parameters["wte.weight"].detach().index_select(0, ids))
        self.rows = Rows(ids, values)
        return values

    def trained(self) -> list[nn.Parameter]:
        """Return what the next update changes: all parameters, or selected rows in place of a matrix."""
        rows = {"wte.weight": self.rows.values} if self.rows else {}
        return list({**self.parameters, **rows}.values())

    def grad_norm(self) -> Tensor:
        """Euclidean norm of the whole gradient, left where it is: a GPU is not waited for. ()."""
        grads = [p.grad for p in self.trained() if p.grad is not None]
        return torch.nn.utils.get_total_norm(grads)

    @torch.no_grad()
    def update(self, step: int, grad_norm: Tensor) -> None:
        """Clip the gradient to training.grad_clip, make update number `step`, and clear the gradient."""
        multiplier = lr_multiplier(self.training, step)
        for group, peak in self._peaks:
            group["lr"] = peak * multiplier
        excess = self._excess(grad_norm)
        # The fused kernel divides by it in the pass that it makes anyway.
        self.adamw.grad_scale = excess  # type: ignore[attr-defined]
        self.adamw.step()
        if self.rows:
            adamw_rows(self.adamw, self.parameters["wte.weight"], self.rows, excess)
            self.rows = None
        if self.muon:
            if excess is not None:
                grads = [p.grad for group in self.muon.param_groups for p in group["params"]]
                torch._foreach_div_(grads, excess)
            muon_step(self.muon, self.share_out)
        for parameter in self.parameters.values():
            parameter.grad = None

    def _excess(self, grad_norm: Tensor) -> Tensor | None:
        """What to divide the gradient by, None for nothing: torch.nn.utils.clip_grad_norm_'s formula. ()."""
        if not self.training.grad_clip:
            return None
        excess = ((grad_norm + 1e-6) / self.training.grad_clip).clamp_min(1.0)
        if excess.device.type == "cpu" and excess.item() == 1:
            return None  # on a CPU asking is free and dividing is not; a GPU divides by 1
        return excess

    def _entries(self) -> Iterator[tuple[str, Optimizer, Tensor, str, tuple[int, ...]]]:
        """Name, optimizer, parameter, key and shape of every tensor of the optimizers' state."""
        for name, parameter in self.parameters.items():
            shape = tuple(parameter.shape)
            if self.muon and self._is_muon(name):
                yield f"muon.momentum_buffer.{name}", self.muon, parameter, "momentum_buffer", shape
            else:
                yield f"adamw.step.{name}", self.adamw, parameter, "step", ()
                yield f"adamw.exp_avg.{name}", self.adamw, parameter, "exp_avg", shape
                yield f"adamw.exp_avg_sq.{name}", self.adamw, parameter, "exp_avg_sq", shape

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything that the next update depends on, after at least one update."""
        return {name: optimizer.state[p][key] for name, optimizer, p, key, _ in self._entries()}

    def zero_state(self) -> dict[str, Tensor]:
        """What `state_tensors` would be before the first update, if there were any then."""
        return {
            name: torch.zeros_like(p) if shape else torch.zeros(())
            for name, _, p, _, shape in self._entries()
        }

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `state_tensors` returned.

        Raises:
            BadData: a tensor is missing, unknown, or of another shape.
        """
        entries = list(self._entries())
        expected = {name: shape for name, _, _, _, shape in entries}
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        wrong = sorted(name for name in expected.keys() | found if expected.get(name) != found.get(name))
        if wrong:
            raise BadData(f"the optimizer's state does not fit the model, first at {wrong[0]}")
        for name, optimizer, parameter, key, _ in entries:
            optimizer.state[parameter][key] = tensors[name].to(parameter.device)
