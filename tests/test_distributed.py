"""Training in two processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

WORKER = """
import gc
import timm, torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
import fma2d

dist.init_process_group("gloo")
torch.manual_seed(0)
# Kernels for the levels of 512 px; at 64 x 96 px the first stage uses level 1, nothing else is used.
model = timm.create_model("fma2d_nano", num_classes=3, img_size=512)
images = torch.randn(4, 3, 64, 96)
alone = {n: p.detach().clone() for n, p in model.named_parameters()}
model(images).square().mean().backward()
expected = {n: p.grad.clone() for n, p in model.named_parameters()}
model.zero_grad()

wrapped = DistributedDataParallel(model)
optimizer = torch.optim.SGD(wrapped.parameters(), 0.1)
for step in range(2):  # a second step fails where a parameter had no part in the first
    optimizer.zero_grad()
    wrapped(images[dist.get_rank() :: 2]).square().mean().backward()
    if step == 0:
        for name, p in model.named_parameters():
            assert torch.allclose(p.grad, expected[name], atol=1e-6, rtol=1e-4), name
    optimizer.step()
unused = [(p[1:], alone[n][1:]) for n, p in model.named_parameters() if n.endswith("kernels") and len(p) > 1]
assert unused and all(torch.equal(p, q) for p, q in unused)
assert not torch.equal(model.stages[0].blocks[0].attn.kernels[0], alone["stages.0.blocks.0.attn.kernels"][0])
for p in model.parameters():
    others = [torch.empty_like(p) for _ in range(2)]
    dist.all_gather(others, p.detach())
    assert torch.equal(*others)
print("done", flush=True)
dist.barrier()  # who leaves first takes the other's connection along
# The threads of gloo must end before Python does, which they do where nothing holds the group any more.
del wrapped, optimizer, others
gc.collect()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_ddp_where_an_image_leaves_levels_unused(tmp_path):
    """Kernels of unused levels get a zero gradient, not none: DDP needs no find_unused_parameters."""
    (tmp_path / "worker.py").write_text(WORKER)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "worker.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.run(launch, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("done") == 2
