"""Expressions whose values and gradients PyTorch has recorded, by family of ops.

`evaluate(torch, text)` runs one on fixed inputs, with PyTorch when it is recorded and with dtrain
when it is tested: results, and the gradients of their weighted sum for every floating input.
Inputs: x, m, v, s float32 with 3, 2, 1, 0 dimensions; p positive, u within (-1, 1), d float64,
h float16, nc not contiguous, z with zeros, ties, odd (nan and inf), e empty; i, j, k integers
(int64, an index, int32), y uint8, t bool.
"""

from __future__ import annotations

from typing import Any

import numpy as np

_r = np.random.RandomState(7)
ARRAYS = {
    "x": ((_r.permutation(24).reshape(2, 3, 4) - 11.3) / 7).astype(np.float32),
    "m": ((_r.permutation(12).reshape(3, 4) - 5.7) / 5).astype(np.float32),
    "v": np.array([0.5, -1.5, 2.0, 1.25], np.float32),
    "s": np.array(1.5, np.float32),
    "p": (_r.permutation(12).reshape(3, 4) / 6 + 0.3).astype(np.float32),
    "u": ((_r.permutation(12).reshape(3, 4) - 5.7) / 7).astype(np.float32),
    "d": (_r.permutation(12).reshape(3, 4) - 5.7) / 3,
    "h": np.array([[1.5, -2.0], [0.25, 3.0]], np.float16),
    "nc": (_r.permutation(12).reshape(4, 3) / 4 - 1).astype(np.float32).T,
    "z": np.array([[2.0, 0.0, -1.0], [0.0, 0.0, 3.0]], np.float32),
    "ties": np.array([[1.0, 2.0, 2.0], [3.0, 3.0, 3.0]], np.float32),
    "odd": np.array([[1.0, np.nan, -np.inf], [np.inf, -2.0, 0.0]], np.float32),
    "e": np.zeros((0, 3), np.float32),
    "i": _r.randint(-5, 7, (3, 4)),
    "j": np.array([2, 1, 0, 1]),
    "k": _r.randint(1, 5, (3, 4)).astype(np.int32),
    "y": _r.randint(0, 9, (3, 4)).astype(np.uint8),
    "t": _r.rand(3, 4) > 0.5,
}

CREATE = """
torch.tensor(1)  torch.tensor(1.5)  torch.tensor(True)  torch.tensor([1, 2.5, True])
torch.tensor([[1, 2], [3, 4]])  torch.tensor([True, 2])  torch.tensor([])  torch.tensor([[]])
torch.tensor([1, 2], dtype=torch.float64)  torch.tensor(1j)  torch.tensor(np.float64(1))
torch.tensor([np.float64(1)])  torch.tensor(np.arange(3, dtype=np.int16))  torch.tensor(m.detach())
torch.tensor([torch.tensor(1), 2.5])  torch.tensor([1.7, -1.7], dtype=torch.int64)
torch.as_tensor([1, 2])  torch.as_tensor(np.ones(2))  torch.from_numpy(np.ones(2, np.int32))
torch.zeros(2, 3)  torch.zeros((2, 3))  torch.zeros(())  torch.zeros(2, dtype=torch.int32)
torch.zeros(size=(2,))  torch.ones(2)  torch.ones(0, 3)  torch.full((2, 2), 3)
torch.full((2,), 1.5)  torch.full((), True)  torch.full((2,), 7, dtype=torch.float64)
torch.zeros_like(m)  torch.ones_like(i)  torch.full_like(k, 3)
torch.zeros_like(m, dtype=torch.int64)  torch.empty(2, 0)  torch.empty_like(e)  torch.arange(5)
torch.arange(0)  torch.arange(1, 6, 2)  torch.arange(5, 0, -2)  torch.arange(0.0, 1, 0.3)
torch.arange(5, dtype=torch.float32)  torch.arange(1, 2.5)  torch.arange(0, 1, 0.1)
torch.linspace(0, 1, 5)  torch.linspace(-2, 3, 7)  torch.linspace(1, 2, 1)  torch.linspace(0, 1, 0)
torch.linspace(0, 10, 11, dtype=torch.int64)  torch.linspace(0, 1, 10, dtype=torch.float64)
torch.logspace(0, 2, 3)  torch.eye(3)  torch.eye(2, 3)  torch.eye(2, dtype=torch.int64)
torch.meshgrid(torch.arange(2), torch.arange(3))
torch.meshgrid(torch.arange(2), torch.arange(3), indexing="xy")  m.new_zeros(2)  i.new_ones(2, 3)
m.new_full((2,), 3)  i.new_tensor([1.5])  m.new_empty(0)  m.new_zeros((2, 2), dtype=torch.int64)
torch.Tensor([1, 2])  torch.Tensor(0)  torch.FloatTensor([1, 2])  torch.LongTensor([1, 2])
torch.LongTensor([1.5])  torch.ByteTensor([1, 0])  torch.DoubleTensor(np.ones(2))
torch.BoolTensor([1, 0])  torch.IntTensor([[1]])  m.new([1, 2])  torch.tril_indices(3, 3)
torch.triu_indices(2, 3, 1)  torch.scalar_tensor(2)  torch.tensor([1, 2]).type(torch.FloatTensor)
i.type(torch.float64)  m.type("torch.LongTensor")
"""
ELEMENTWISE = """
m + v  m - v  m * v  m / p  m + 1  1 - m  m * 2  2 / p  m ** 2  p ** 0.5  p ** 3  p ** -1  p ** 0
p ** v  2 ** m  z ** 2  z ** 0  z ** 1  z ** 3  0 ** p  p ** i  m % 0.7  m % p  torch.fmod(m, 0.7)
torch.fmod(m, p)  torch.remainder(m, p)  -m  +m  abs(m)  m @ v  v @ v  m + d  d * m  m + s  s * d
d + s  m + i  i + k  k + y  y + t  t + t  t * t  t + 1  i + 1.5  y + 300  y - 9  y * 200  i / k
i / 2  7 / k  y / 2  i // k  i // 2  i % k  i % 3  -7 // k  i ** 2  k ** k  2 ** k  t ** 2  i * t
h + 1  h * h  h + h[0]  h / 3  i * 1.5  t * 2.5  k / k  y // 2  s + 1  s * i
torch.div(i, k, rounding_mode="trunc")  torch.div(i, k, rounding_mode="floor")  i.div(2)
torch.div(m, p, rounding_mode="trunc")  torch.div(m, p, rounding_mode="floor")  torch.fmod(i, 3)
torch.add(m, v, alpha=2)  torch.sub(m, v, alpha=0.5)  torch.rsub(m, v)  torch.mul(m, 3)
torch.addcmul(m, v, p, value=2)  torch.addcdiv(m, v, p, value=0.5)  torch.lerp(m, p, 0.3)
torch.lerp(m, p, 0.7)  torch.lerp(m, p, u)  torch.true_divide(i, 2)  torch.pow(p, v)
torch.pow(2, v)  torch.pow(i, 3)  m.pow(2)  torch.atan2(m, p)  torch.hypot(m, v)
torch.logaddexp(m, v)  torch.maximum(m, v)  torch.minimum(m, v)  torch.maximum(ties, ties)
torch.maximum(odd, odd * 0)  torch.minimum(odd, torch.tensor(0.5))  torch.maximum(i, k)
torch.xlogy(z, 2 * ties)  m.clamp(-0.5, 0.5)  m.clamp(min=0)  m.clamp(max=0.3)  m.clip(-0.1, 0.2)
i.clamp(0, 3)  i.clamp(0.5, 2.5)  odd.clamp(-1, 1)  torch.clamp(m, v, s)  m.clamp_min(0.1)
m.clamp(torch.tensor(-0.5), torch.tensor(0.5))  z.clamp(0, 2)  torch.exp(m)  torch.exp2(m)
torch.expm1(m)  torch.log(p)  torch.log2(p)  torch.log10(p)  torch.log1p(p)  torch.sqrt(p)
torch.rsqrt(p)  torch.sin(m)  torch.cos(m)  torch.tan(u)  torch.asin(u)  torch.acos(u)
torch.atan(m)  torch.sinh(m)  torch.cosh(m)  torch.tanh(m)  torch.asinh(m)  torch.acosh(p + 1)
torch.atanh(u)  torch.sigmoid(m)  torch.sigmoid(m * 100)  torch.erf(m)  torch.reciprocal(p)
torch.square(m)  torch.abs(z)  torch.sign(z)  torch.floor(m)  torch.ceil(m)  torch.trunc(m)
torch.round(m)  torch.round(m, decimals=1)  torch.frac(m)  torch.logit(torch.abs(u) + 0.05)
torch.deg2rad(m)  torch.rad2deg(m)  torch.nan_to_num(odd)  torch.nan_to_num(odd, 1.0, 2.0, 3.0)
torch.exp(i)  torch.sqrt(k)  torch.sigmoid(y)  torch.exp(t)  torch.abs(i)  torch.sign(i)
torch.sign(t)  torch.floor(i)  torch.exp(h)  torch.log(z)  torch.sqrt(z)  torch.exp(e)  e + 1
torch.neg(i)  torch.positive(m)  torch.exp(nc)  nc * m  nc + nc  odd * 0  odd + 1  odd > 0  m == v
m != 0  m < v  m <= 0  m > 0  m >= v  i == k  i < 1.5  y < 300  t == True  odd == odd
torch.eq(m, m)  torch.logical_and(t, m)  torch.logical_or(t, i)  torch.logical_xor(t, m)
torch.logical_not(i)  i & k  i | 3  i ^ k  ~i  ~t  t & t  t | True  t ^ t  i << 1  k >> 1
torch.isnan(odd)  torch.isinf(odd)  torch.isfinite(odd)  torch.isposinf(odd)  torch.isneginf(odd)
torch.signbit(z)  torch.isclose(m, m + 1e-9)  torch.allclose(m, m + 1)  torch.equal(m, m)
torch.where(t, m, p)  torch.where(t, m, 0.0)  torch.where(t, 1, 0)  torch.where(t, m, d)
torch.where(t, v, s)  torch.where(t, i, 2.5)  torch.where(t)  torch.where(m > 0, m, m * 0.1)
m.float()  m.double()  m.half()  m.long()  i.float()  d.float()  t.int()  m.bool()  z.bool()
m.to(torch.float64)  m.to(d)  i.to(torch.uint8)  t.float()  h.double()  m.type_as(d)  odd.isnan()
"""
INDEX = """
x[0]  x[-1]  x[:, 1]  x[..., 0]  x[0, 1, 2]  x[1:, :2]  x[:, ::2]  x[None]  x[:, None, 1]
x[..., None]  x[[0, 1]]  x[[[0, 1], [1, 0]]]  x[[0, 1], [1, 2]]  x[j[1:3]]  x[:, j]  x[..., j]
x[:, j, 0]  x[0, :, j]  x[0, j, :]  x[torch.tensor([0, 1]), :, torch.tensor([1, 3])]  x[0, j, None]
x[torch.tensor([0, 1]), torch.tensor([0, 1])]  x[:, torch.tensor([[0, 1], [2, 0]])]  x[-1, j, -1]
x[torch.tensor([True, False])]  x[:, torch.tensor([True, False, True])]  x[x > 0]  m[t]  m[~t]
m[m > 100]  m[t.nonzero(as_tuple=True)]  x[True]  x[False]  x[torch.tensor(1)]
x[torch.tensor(True)]  x[[]]  x[0:0]  x[5:]  x[-1:]  x[np.array([0, 1])]  x[range(2)]
x[slice(0, 1)]  x[np.int64(1)]  x[torch.tensor([-1, 0, -1])]  m[[2, 0]][:, [3, 0]]
m[torch.arange(3), j[:3]]  v[1]  v[j]  s[None]  s[...]  nc[1]  nc[:, j]  i[0]  i[t]  e[0:0]
m[torch.tensor([[0], [2]]), torch.tensor([1, 3])]  m[1:2, j]  x[None, j[:2] % 2]
x[..., torch.tensor([0, 2]), 1]  x[1, ..., torch.tensor([0, 2])]  m.gather(0, i.abs() % 3)
m.gather(1, i.abs() % 4)  x.gather(2, x.argsort(2))  v.gather(0, j)
m.gather(1, torch.tensor([[0, 0]]))  torch.take_along_dim(m, m.argsort(1), 1)
s.gather(0, i[0, 0] * 0)  m.scatter(1, torch.tensor([[0, 1], [2, 3], [1, 0]]), p[:, :2])
m.scatter(0, torch.tensor([[2, 0]]), 5.0)  m.scatter(1, torch.tensor([[3]]), value=2.0)
m.scatter_add(0, i.abs() % 3, p)  m.scatter_add(1, torch.tensor([[0, 0, 1]]), p[:1, :3])
v.scatter_add(0, j, m[0])  m.index_select(0, j % 3)  m.index_select(1, j)  v.index_select(0, j)
m.index_add(0, torch.tensor([0, 2, 0]), p)  m.index_add(1, torch.tensor([1, 1]), p[:, :2], alpha=2)
m.index_fill(1, torch.tensor([0, 2]), 9.0)  m.index_copy(0, torch.tensor([2, 0]), p[:2])
torch.take(m, torch.tensor([[0, 5], [11, 3]]))  m.masked_fill(t, 0.0)  m.masked_fill(t, s)
x.masked_fill(t, -1.0)  i.masked_fill(t, 7)
m.masked_fill(torch.tensor([True, False, True, False]), 1.5)  torch.masked_select(m, t)
torch.masked_select(x, t)  m.masked_select(m > 0.5)  torch.nonzero(t)  t.nonzero()  z.nonzero()
torch.nonzero(s)  torch.argwhere(z)  torch.nonzero(z, as_tuple=True)  torch.take_along_dim(m, j)
torch.nn.functional.embedding(j % 3, m)
torch.nn.functional.embedding(i.abs() % 3, m, padding_idx=1)  torch.nn.functional.one_hot(j)
torch.nn.functional.one_hot(j, 5)  list(x)  [r.sum() for r in m]  torch.select(x, 1, 2)
x.select(-1, 0)  m.unbind()  m.unbind(1)
"""
LINALG = """
m @ p.t()  m @ v  v @ m.t()  v @ v  x @ p.t()  x @ v  v @ x.transpose(1, 2)  x @ x.transpose(1, 2)
x @ m.t().expand(2, 4, 3)  x[:, None] @ m.t()  torch.matmul(m, p.T)  torch.mm(m, p.t())  nc @ nc.t()
torch.bmm(x, x.transpose(1, 2))  torch.dot(v, v)  torch.mv(m, v)  torch.outer(v, m[0])
torch.inner(m, p)  torch.inner(v, v)  torch.addmm(m[:, :3], m, p.t())  e @ torch.ones(3, 2)
torch.addmm(m[:, :3], m, p.t(), beta=0.5, alpha=2)  torch.addmv(m[:, 0], m, v)
torch.addr(m, m[:, 0], v)  torch.baddbmm(x[:, :, :3], x, x.transpose(1, 2))  i @ k.long().t()
torch.tensordot(x, m, 2)  torch.tensordot(x, m, ([1], [0]))  torch.tensordot(x, x, ([0, 2], [0, 2]))
torch.nn.functional.linear(m, p)  torch.nn.functional.linear(x, p, m[:, 0])  d @ d.t()
torch.nn.functional.linear(v, p)  torch.einsum("ij,kj->ik", m, p)  torch.einsum("ij->ji", m)
torch.einsum("ij->", m)  torch.einsum("ij,j", m, v)  torch.einsum("i,j->ij", v, v)
torch.einsum("bij,bkj->bik", x, x)  torch.einsum("bij,jk,k->bi", x, m.t(), m[:, 0])
torch.einsum("ii->i", m[:, :3])  torch.einsum("ii", m[:, :3])  torch.einsum("bii->b", x[:, :, :3])
torch.einsum("...ij,...kj->...ik", x, m)  torch.einsum("...j,j->...", x, v)
torch.einsum("ij,ij->i", m, p)  torch.einsum("ij,ij->ij", m, p)
torch.einsum("abc,acd->abd", x, x.transpose(1, 2))  torch.einsum("i,i->", v, v)
torch.einsum("ij,kl->ijkl", m[:2, :2], p[:2, :2])  torch.einsum("b...->...b", x)  torch.diagonal(m)
torch.diagonal(x, 1, 1, 2)  torch.diag(v)  torch.diag(m)  torch.diag(m, 1)  torch.diag(v, -1)
torch.diag_embed(m)  torch.trace(m[:, :3])  x.diagonal(dim1=0, dim2=2)
"""
REDUCE = """
x.sum()  x.sum(1)  x.sum(-1, keepdim=True)  x.sum((0, 2))  x.sum(dim=())  s.sum()  s.sum(0)  e.sum()
e.sum(0)  e.sum(1)  i.sum()  t.sum()  y.sum(1)  h.sum()  i.sum(dtype=torch.float32)  x.sum(axis=1)
m.mean()  x.mean(0)  x.mean((1, 2), keepdim=True)  h.mean()  i.mean(dtype=torch.float32)  e.mean()
e.mean(1)  m.var()  m.var(1)  m.var(0, unbiased=False)  x.var((0, 2), correction=0)  m.var(False)
m.std()  x.std(1, keepdim=True)  m.std(1, False)  s.var()  torch.var_mean(m, 1)  torch.std_mean(m)
m.norm()  m.norm(dim=1)  m.norm(1)  m.norm(3, 0)  m.norm(float("inf"))  m.norm(-float("inf"), 1)
z.norm(0, 1)  z.norm(dim=0)  torch.norm(x, 2, (0, 1))  m.prod()  p.prod(1)  z.prod(1)  z.prod(0)
z.prod()  i.prod()  p.prod(0, keepdim=True)  e.prod()  y.prod(1)  x.amax()  x.amax(1)  ties.amax(1)
ties.amin(1)  ties.amax()  ties.max()  ties.min()  ties.max(1)  ties.min(1)  x.max(2)  x.min(0)
x.max(1, keepdim=True)  x.max(1, True)  m.max(0).values  i.max(1)  t.max()  odd.max()  odd.min()
odd.max(1)  odd.min(1)  odd.argmax(1)  odd.argmin(1)  odd.argmax()  m.argmax()  m.argmax(1)
m.argmin(0, keepdim=True)  ties.argmax(1)  ties.argmin(1)  i.argmax(1)  s.max()  s.max(0)
s.argmax()  torch.max(m, p)  torch.min(m, v)  torch.aminmax(m)  torch.aminmax(m, dim=1)  t.any()
t.all()  t.any(1)  t.all(0)  m.any()  y.all()  y.any(1)  z.all(1)  e.all()  e.any()
torch.count_nonzero(z)  torch.count_nonzero(z, 1)  x.logsumexp(1)  m.logsumexp((0, 1))
odd.logsumexp(0)  torch.logsumexp(torch.tensor([-float("inf"), -float("inf")]), 0)  i.logsumexp(1)
m.cumsum(0)  m.cumsum(1)  i.cumsum(1)  y.cumsum(0)  t.cumsum(1)  p.cumprod(1)  z.cumprod(1)
z.cumprod(0)  i.cumprod(0)  torch.cummax(ties, 1)  torch.cummin(m, 0)  torch.cummax(odd, 1)
torch.diff(m)  torch.diff(m, dim=0)  torch.diff(v, 2)  torch.diff(t)  s.cumsum(0)  nc.sum(0)
nc.max(1)  nc.cumsum(1)  torch.nansum(odd)  torch.nansum(odd, 1)  d.sum(0)  d.mean()  d.var(1)
m.sum(1, dtype=torch.float64)  torch.softmax(m, 1)  torch.log_softmax(m, 0)  m.softmax(-1)
torch.softmax(odd[1], 0)
"""
SHAPE = """
x.reshape(6, 4)  x.reshape(-1)  x.reshape(2, -1)  x.view(3, 8)  x.view(-1, 2, 6)  e.reshape(0)
e.reshape(3, 0)  nc.reshape(-1)  nc.reshape(2, 6)  x.flatten()  x.flatten(1)  x.flatten(0, 1)
s.flatten()  x.unflatten(2, (2, 2))  x.unflatten(1, (-1,))  x.squeeze()  x[:, :1].squeeze(1)
x[:1, :1].squeeze()  x[:, :1].squeeze(0)  x.unsqueeze(0)  x.unsqueeze(-1)  v.unsqueeze(1)
x.transpose(0, 2)  x.transpose(-1, 0)  m.t()  m.T  v.t()  s.t()  x.permute(2, 0, 1)
x.permute(-1, 0, 1)  x.mT  x.movedim(0, 2)  x.movedim((0, 1), (1, 2))  torch.swapaxes(x, 0, 1)
v.expand(3, 4)  v.expand(3, -1)  s.expand(2, 3)  m[:, :1].expand(3, 5)  m.expand_as(x)
v.broadcast_to(2, 4)  torch.broadcast_to(v, (2, 4))  torch.broadcast_tensors(v, m)  v.repeat(2)
v.repeat(2, 3)  m.repeat(1, 2)  m.repeat(2, 1, 1)  torch.tile(v, (2,))  torch.tile(m, (2, 1))
v.repeat_interleave(2)  torch.repeat_interleave(m, 2, 0)
torch.repeat_interleave(m, torch.tensor([1, 0, 2]), 0)  torch.cat([m, p])  torch.cat([m, p], 1)
torch.cat((m, d), -1)  torch.cat([m, i])  torch.cat([e, e])  torch.cat([torch.zeros(0), v])
torch.cat([v])  torch.concat([v, v])  torch.stack([m, p])  torch.stack([m, p], 1)
torch.stack([m, p], -1)  torch.stack([s, s])  torch.hstack([v, v])  torch.hstack([m, p])
torch.vstack([v, v])  torch.dstack([m, p])  torch.column_stack([v, v])
torch.column_stack([m, m[:, 0]])  torch.atleast_2d(v)  torch.atleast_1d(s)  torch.atleast_3d(m)
x.narrow(2, 1, 2)  x.narrow(1, -2, 1)  m.split(2)  m.split([1, 2])  m.split(3, 1)
x.split((1, 3), 2)  m.chunk(2)  m.chunk(5)  m.chunk(3, 1)  x.chunk(2, dim=-1)
torch.tensor_split(v, 3)  torch.tensor_split(v, (1, 3))  m.flip(0)  x.flip(0, 2)  m.flip((0, 1))
torch.fliplr(m)  torch.flipud(m)  m.roll(1)  m.roll(1, 0)  m.roll((1, -1), (0, 1))  m.tril()
m.tril(-1)  m.triu()  x.triu(1)  m.clone()  nc.contiguous()  m.ravel()  torch.numel(x)
m.view_as(p.reshape(3, 4))  m.reshape_as(p)  i.repeat(2, 1)  i.flip(0)  t.reshape(-1)
torch.broadcast_to(s, ())  x.swapaxes(0, 2)  x.size()  x.shape[1]  x.dim()  x.stride()  nc.stride()
x.is_contiguous()  nc.is_contiguous()  x.numel()  nc.t().is_contiguous()
"""
SORTING = """
m.sort()  m.sort(0)  m.sort(1, descending=True)  ties.sort(1)
ties.sort(descending=True, stable=True)  odd.sort(1)  odd.sort(1, descending=True)
i.sort(dim=1, stable=True)  s.sort()  m.argsort()  m.argsort(0)  m.argsort(1, descending=True)
torch.argsort(v)  m.topk(2)  m.topk(2, 0)  m.topk(2, largest=False)  odd.topk(2)  x.topk(1, 1)
m.topk(0)  s.topk(1)  m.kthvalue(2)  m.kthvalue(1, 0, keepdim=True)  m.median()  m.median(1)
v.median()  odd.median()  odd.median(1)  x.median(0, keepdim=True)  torch.unique(i)
torch.unique(i, return_inverse=True)  torch.unique(i, return_counts=True)
torch.unique(ties.detach())  torch.unique(torch.tensor([[1, 2], [1, 2]]), dim=0)
torch.unique_consecutive(torch.tensor([1, 1, 2, 1]), return_counts=True)
torch.unique_consecutive(torch.tensor([1, 1, 2, 1]), return_inverse=True)  torch.bincount(j)
torch.bincount(j, minlength=6)  torch.bincount(j, v.detach())
torch.searchsorted(torch.tensor([1, 3, 5]), j)
torch.searchsorted(torch.tensor([1, 3, 5]), j, right=True)  torch.bucketize(j, torch.tensor([1, 2]))
torch.isin(i, torch.tensor([1, 2]))  nc.sort(1)  e.sort(0)  t.sort(dim=1, stable=True)
"""


def _split(table: str) -> list[str]:
    return [part.strip() for line in table.strip().splitlines() for part in line.split("  ")]


FAMILIES = {
    "create": _split(CREATE), "elementwise": _split(ELEMENTWISE), "index": _split(INDEX),
    "linalg": _split(LINALG), "reduce": _split(REDUCE), "shape": _split(SHAPE),
    "sorting": _split(SORTING),
}  # fmt: skip


def inputs(torch: Any) -> dict[str, Any]:
    """The tensors, the floating ones as leaves that require grad."""
    tensors = {name: torch.from_numpy(array.copy("K")) for name, array in ARRAYS.items()}
    for tensor in tensors.values():
        if tensor.is_floating_point():
            tensor.requires_grad_()
    return tensors


def _flat(value: Any) -> list[Any]:
    return (
        [v for part in value for v in _flat(part)] if isinstance(value, tuple | list) else [value]
    )


def evaluate(torch: Any, text: str) -> dict[str, Any]:
    """{"0": first result, ...} and {"d/dx": gradient of the weighted sum of results, ...}."""
    tensors = inputs(torch)
    results = _flat(eval(text, {"torch": torch, "np": np, **tensors}))
    found: dict[str, Any] = {}
    terms = []
    for number, result in enumerate(results):
        if not isinstance(result, torch.Tensor):
            found[str(number)] = np.asarray(result)
            continue
        found[str(number)] = result.detach().numpy()
        if result.requires_grad:
            weights = np.cos(np.arange(result.numel())).reshape(result.shape)
            terms.append((result.double() * torch.from_numpy(weights)).sum())
    if terms:
        sum(terms[1:], terms[0]).backward()
    found |= {
        f"d/d{name}": tensor.grad.numpy()
        for name, tensor in tensors.items()
        if tensor.is_leaf and tensor.requires_grad and tensor.grad is not None
    }
    return found
