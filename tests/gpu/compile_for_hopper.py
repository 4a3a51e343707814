"""Compiles every kernel for an H100 or H200 (sm_90) on a machine without a GPU: `python compile_for_hopper.py OP`.

The public functions run as on a GPU, on CPU tensors, except that a launch compiles its kernel and does not run it; so
the kernels are specialised as they will be (arguments of 1, None, divisibility by 16). The numbers mean nothing.
Prints a line a kernel and exits 0 if all of them compile. TRITON_INTERPRET must not be set.
"""

import sys
from collections.abc import Callable

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

SHARED_MEMORY = 227 * 1024  # what one block of an sm_90 multiprocessor can have


class NoGpu:
    """As much of a Triton driver as compiling asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_instead(kernel: JITFunction, grid: tuple[int, ...]) -> Callable[..., None]:
    def launch(*args, **kwargs) -> None:
        # Twice: the second launch takes the path of a kernel that is compiled already.
        compiled = [kernel.warmup(*args, grid=grid, **kwargs) for _ in range(2)][1]
        shared, tensor_cores = compiled.metadata.shared, "wgmma" in compiled.asm["ptx"]
        assert shared <= SHARED_MEMORY, f"{compiled.name} wants {shared} bytes of shared memory"
        assert len(compiled.asm["cubin"]) > 0
        print(f"{compiled.name}: {shared} bytes shared, {'wgmma' if tensor_cores else 'no tensor cores'}", flush=True)

    return launch


def rank_ratio() -> None:
    import rankgrpo_kernels.rank_ratio as op

    op.INTERPRETED = True  # lets CPU tensors through the check
    for num_tokens, num_ranks, dtype, rank_dtype, options in (
        (512, 20, torch.float32, torch.int64, {}),
        (512, 20, torch.float32, torch.int64, {"kl_coef": 1e-3, "on_policy": True}),
        (1, 1, torch.bfloat16, torch.int32, {"kl_coef": 1e-3, "reduction": "token"}),
        (3000, 3000, torch.bfloat16, torch.int16, {"reduction": "token", "weights": True}),
    ):
        logp = torch.zeros(2, num_tokens, dtype=dtype, requires_grad=True)
        rank = torch.zeros(2, num_tokens, dtype=rank_dtype)
        advantage = torch.zeros(2, 1).expand(2, num_ranks)
        options = dict(options)
        old = None if options.pop("on_policy", False) else logp.detach()
        weight = advantage if options.pop("weights", False) else None
        ref = logp.detach() if "kl_coef" in options else None
        loss, _ = op.fused_rank_grpo_loss(logp, old, rank, advantage, ref_logp_BT=ref, weight_BK=weight, **options)
        loss.backward()


def linear_logprob() -> None:
    import rankgrpo_kernels.linear_logprob as op

    op.INTERPRETED = True
    for num_rows, num_ids, num_hidden, dtype, masked in (
        (130, 1000, 896, torch.bfloat16, False),
        (130, 1000, 72, torch.bfloat16, True),
        (1, 1, 16, torch.float32, True),
        (130, 1000, 96, torch.float32, False),
    ):
        hidden = torch.ones(num_rows, num_hidden, dtype=dtype, requires_grad=True)
        weight = torch.ones(num_ids, num_hidden, dtype=dtype, requires_grad=True)
        ids = torch.zeros(num_rows, dtype=torch.int64)
        allowed = torch.ones(num_ids, dtype=torch.bool) if masked else None
        logp = op.fused_token_logprobs(hidden, weight, ids, allowed_V=allowed)
        logp.backward(torch.ones(num_rows))


def main() -> None:
    if triton.knobs.runtime.interpret:
        sys.exit("TRITON_INTERPRET is set: unset it to compile")
    driver.set_active(NoGpu())
    JITFunction.__getitem__ = compile_instead
    {"rank_ratio": rank_ratio, "linear_logprob": linear_logprob}[sys.argv[1]]()


if __name__ == "__main__":
    main()
