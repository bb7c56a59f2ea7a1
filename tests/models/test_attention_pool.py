"""Attention over fields: its formulas, and what it must not depend on."""

from __future__ import annotations

import pytest
import torch

from ernet_fast.models.attention_pool import POOLS, GatedAttention, MagnificationAttention, MultiHeadAttention


def bag(seed: int = 0, count: int = 5, features: int = 12):
    generator = torch.Generator().manual_seed(seed)
    powers = torch.tensor([40, 100, 200, 400, 40, 200, 100])[:count]
    return torch.randn((1, count, features), generator=generator), powers[None]


def test_gated_attention_is_the_formula():
    torch.manual_seed(0)
    pool = GatedAttention(6, hidden=4).double()
    h = torch.randn(3, 6, dtype=torch.float64)
    scores = []
    for field in h:
        content = torch.tanh(pool.content.weight @ field + pool.content.bias)
        gate = torch.sigmoid(pool.gate.weight @ field + pool.gate.bias)
        scores.append((pool.score.weight[0] * content * gate).sum() + pool.score.bias[0])
    weights = torch.stack(scores).exp() / torch.stack(scores).exp().sum()
    pooled, found = pool(h[None], torch.ones(1, 3, dtype=torch.bool))
    torch.testing.assert_close(found[0], weights)
    torch.testing.assert_close(pooled[0], weights @ h)


def test_multihead_attention_is_the_formula():
    torch.manual_seed(0)
    pool = MultiHeadAttention(8, heads=2).double().eval()
    h = torch.randn(4, 8, dtype=torch.float64)

    def attention(module, query, keys):
        wq, wk, wv = module.in_proj_weight.chunk(3)
        bq, bk, bv = module.in_proj_bias.chunk(3)
        q, k, v = query @ wq.T + bq, keys @ wk.T + bk, keys @ wv.T + bv
        heads = [((q[:, s] @ k[:, s].T) / 2.0).softmax(dim=1) for s in (slice(0, 4), slice(4, 8))]
        mixed = torch.cat([a @ v[:, s] for a, s in zip(heads, (slice(0, 4), slice(4, 8)), strict=True)], dim=1)
        return mixed @ module.out_proj.weight.T + module.out_proj.bias, (heads[0] + heads[1]) / 2

    normed = pool.before(h)
    after = pool.after(h + attention(pool.among, normed, normed)[0])
    expected, weights = attention(pool.pool, pool.query[0], after)
    pooled, found = pool(h[None], torch.ones(1, 4, dtype=torch.bool))
    torch.testing.assert_close(pooled, expected)
    torch.testing.assert_close(found, weights)


@pytest.mark.parametrize("pool", POOLS)
def test_padding_and_order_change_nothing(pool):
    torch.manual_seed(1)
    model = MagnificationAttention(12, 3, pool=pool, features=16).eval()
    embeddings, powers = bag()
    alone = model(embeddings, powers)
    assert alone.logits.shape == (1, 3)
    torch.testing.assert_close(alone.weights.sum(dim=1), torch.ones(1))
    padded = torch.cat([embeddings, torch.full((1, 2, 12), float("nan"))], dim=1)
    there = torch.tensor([[True] * 5 + [False] * 2])
    found = model(padded, torch.cat([powers, powers[:, :2]], dim=1), there)
    torch.testing.assert_close(found.logits, alone.logits)
    torch.testing.assert_close(found.weights[:, :5], alone.weights)
    assert (found.weights[:, 5:] == 0).all()
    order = torch.tensor([3, 0, 4, 1, 2])
    turned = model(embeddings[:, order], powers[:, order])
    torch.testing.assert_close(turned.logits, alone.logits)
    torch.testing.assert_close(turned.weights, alone.weights[:, order])


@pytest.mark.parametrize("pool", POOLS)
def test_the_magnification_matters_and_everything_learns(pool):
    torch.manual_seed(2)
    model = MagnificationAttention(12, 2, pool=pool, features=16)
    embeddings, powers = bag()
    embeddings.requires_grad_()
    model(embeddings, powers).logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert embeddings.grad.abs().sum() > 0
    model.eval()
    other = model(embeddings, torch.full_like(powers, 400)).logits
    assert not torch.allclose(other, model(embeddings, powers).logits)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="pool='mean'"):
        MagnificationAttention(4, 2, pool="mean")
    with pytest.raises(ValueError, match="each once"):
        MagnificationAttention(4, 2, magnifications=(40, 40))
    with pytest.raises(ValueError, match="multiple of the heads"):
        MagnificationAttention(4, 2, pool="multihead", features=10, heads=4)
    model = MagnificationAttention(12, 2, magnifications=(40, 100))
    embeddings, powers = bag()
    with pytest.raises(ValueError, match="none of"):
        model(embeddings, powers)
    with pytest.raises(ValueError, match="no field"):
        model(embeddings, torch.full_like(powers, 40), torch.zeros_like(powers, dtype=torch.bool))
