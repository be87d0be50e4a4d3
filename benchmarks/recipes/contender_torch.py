"""Measure a training step of Hugging Face PEFT, in a process with PyTorch, and print a JSON line.

The step is that of ``contender.py``: random weights, LoRA on all seven projections, the mean
cross-entropy of random tokens, gradients clipped by their norm, fused AdamW. No JAX is imported::

    python benchmarks/recipes/contender_torch.py --sizes sizes.json --batch 4 --length 2048
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import peft
import torch
import transformers

PROJECTIONS = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]


def main() -> None:
    """Measure, and print a line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", type=Path, required=True, help="a config.json")
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--length", type=int, required=True)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument("--checkpoint", action="store_true", help="gradient checkpointing")
    parser.add_argument("--autocast", action="store_true", help="float32 adapters under autocast")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**json.loads(args.sizes.read_text()), use_cache=False)
    torch.set_default_dtype(getattr(torch, args.dtype))
    with torch.device(device):
        model = transformers.LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.config._attn_implementation = "sdpa"
    if args.checkpoint:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    options = peft.LoraConfig(r=args.rank, lora_alpha=16, target_modules=PROJECTIONS)
    model = peft.get_peft_model(model, options, autocast_adapter_dtype=args.autocast).train()
    trained = [x for x in model.parameters() if x.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=device == "cuda")
    step_model = torch.compile(model) if args.compile else model
    ids = torch.randint(0, config.vocab_size, (args.batch, args.length), device=device)

    def step() -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=args.autocast):
            loss = step_model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def finish() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    start = time.perf_counter()
    for _ in range(3):
        step()
    finish()
    warm = time.perf_counter() - start
    times = []
    for _ in range(args.repeats):
        start = time.perf_counter()
        step()
        finish()
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None
    versions = f"peft {peft.__version__}, torch {torch.__version__}"
    versions += f", transformers {transformers.__version__}"
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    found = {"ms": 1000 * statistics.median(times), "memory_gb": peak, "warm_s": warm}
    found |= {"attention": "sdpa", "versions": versions, "device": name}
    found |= {"trained": sum(x.numel() for x in trained)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
