"""The models whose training step is timed, written once for both libraries.

`build(torch, name)` takes the library as an argument: with the same seed the parameters, the batch
and the losses are the same in both.
"""

from __future__ import annotations

import time


def build(torch, name):
    """(model returning the loss, inputs, targets) of "mlp", "cnn", "gpt" or "paced"."""
    torch.manual_seed(0)
    model = {"mlp": mlp, "cnn": cnn, "gpt": gpt, "paced": paced}[name](torch)
    if name == "gpt":
        return model, torch.randint(0, 256, (8, 128)), torch.randint(0, 256, (8, 128))
    if name == "paced":
        return model, torch.ones(4, requires_grad=True), None
    if name == "cnn":
        return model, torch.randn(32, 3, 32, 32), torch.randint(0, 10, (32,))
    return model, torch.randn(64, 784), torch.randint(0, 10, (64,))


def classifier(torch, layers):
    class Classifier(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = layers

        def forward(self, x, target):
            return torch.nn.functional.cross_entropy(self.layers(x), target)

    return Classifier()


def mlp(torch):
    """784-1024-1024-10, 1.9 M parameters, batch 64."""
    nn = torch.nn
    return classifier(torch, nn.Sequential(
        nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10),
    ))  # fmt: skip


def cnn(torch):
    """Six 3x3 convolutions with batch norm on 32x32 images, 0.3 M parameters, batch 32."""
    nn = torch.nn

    def block(inputs, outputs):
        conv = nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())

    return classifier(torch, nn.Sequential(
        block(3, 32), block(32, 32), nn.MaxPool2d(2), block(32, 64), block(64, 64),
        nn.MaxPool2d(2), block(64, 128), block(128, 128), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(128, 10),
    ))  # fmt: skip


def gpt(torch, vocabulary=256, context=128, width=384, depth=6, heads=6):
    """A decoder of six blocks of width 384, 10.9 M parameters, batch 8 x 128 tokens."""
    nn, F = torch.nn, torch.nn.functional

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.fc, self.out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x):
            batch, length, _ = x.shape
            parts = self.qkv(self.ln1(x)).split(width, dim=2)
            shape = (batch, length, heads, width // heads)
            q, k, v = (part.view(*shape).transpose(1, 2) for part in parts)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.proj(y.transpose(1, 2).contiguous().view(batch, length, width))
            return x + self.out(F.gelu(self.fc(self.ln2(x)), approximate="tanh"))

    class GPT(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens = nn.Embedding(vocabulary, width)
            self.positions = nn.Embedding(context, width)
            self.blocks = nn.ModuleList(Block() for _ in range(depth))
            self.ln = nn.LayerNorm(width)
            self.head = nn.Linear(width, vocabulary, bias=False)

        def forward(self, tokens, targets):
            x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
            for block in self.blocks:
                x = block(x)
            scores = self.head(self.ln(x)).view(-1, vocabulary)
            return F.cross_entropy(scores, targets.view(-1))

    return GPT()


def paced(torch, width=384, depth=6, forward=0.011, backward=0.019):
    """The gradients of gpt's blocks at the pace at which gpt has them, by a core that sleeps.

    `forward`, `backward`: seconds for each weight. Shows what is hidden when computing leaves
    cores free for communication, as it does on another device.
    """
    nn = torch.nn

    class Layer(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.weight = weight
            time.sleep(forward)
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            time.sleep(backward)
            return grad, torch.ones_like(ctx.weight)

    class Paced(nn.Module):
        def __init__(self):
            super().__init__()
            sizes = [width * width * times for times in (3, 1, 4, 4)] * depth
            self.weights = nn.ParameterList([nn.Parameter(torch.zeros(size)) for size in sizes])

        def forward(self, x, targets):
            for weight in self.weights:
                x = Layer.apply(x, weight)
            return x.sum()

    return Paced()
