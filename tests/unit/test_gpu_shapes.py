"""The arithmetic of the GPU benchmarks, which itself needs no GPU."""

from __future__ import annotations

import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path += [str(BENCHMARKS), str(BENCHMARKS / "gpu")]

from rollouts import random_batch  # noqa: E402
from shapes import SHAPES, Shape, lognormal_lengths  # noqa: E402
from step_profile import kind_of  # noqa: E402


def test_shapes_have_the_published_sizes() -> None:
    weights = {name: shape.layer_weights + shape.vocabulary * shape.hidden for name, shape in SHAPES.items()}
    assert 0.59e9 < weights["0.6b"] < 0.6e9 and 1.71e9 < weights["1.7b"] < 1.73e9


def test_flops_of_a_model_counted_by_hand() -> None:
    shape = Shape(hidden=4, layers=2, heads=2, kv_heads=1, intermediate=8, head_dim=2, vocabulary=10)
    matrices = 2 * (4 * 4 + 2 * 4 * 2 + 4 * 4 + 3 * 4 * 8)  # query, key and value, output, MLP
    scores = 2 * 2 * 2 * (9 + 25)  # layers x heads x head_dim; half of two products of 2 flops, forward
    assert shape.flops([3, 5], n_scored=6) == 6 * (matrices * 8 + 10 * 4 * 6) + 6 * scores


def test_batches_run_the_lengths_asked_for() -> None:
    lengths = lognormal_lengths(5000, median=100, sigma=1.0, longest=1000, seed=0)
    assert 4000 < sum(lengths) <= 5000 and max(lengths) <= 1000
    batch = random_batch(lengths, vocabulary=50, prompt=16)
    assert (batch.cu_seqlens.diff() - 1).tolist() == lengths


def test_kernels_are_told_apart() -> None:
    assert kind_of("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>") == "attention"
    assert kind_of("nvjet_tst_256x128_64x4_1x2_h_bz_coopA_NNT") == "matrix products"
    assert kind_of("triton_red_fused_exp_1") == "layers, compiled" and kind_of("Memcpy HtoD (Pinned -> Device)") == "copies"
