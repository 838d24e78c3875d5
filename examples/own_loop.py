"""A training loop of one's own on an engine's executor: the digits, momentum, a learning rate that falls by hand.

    python examples/own_loop.py [epochs]

``fit`` does this and more (checkpoints, validation, what happens when a loss is not finite). An executor is the part
that computes; whatever one wants to do between its calls is one's own business.
"""

import sys
from dataclasses import replace

import numpy as np

import convolt as cv


def train(epochs: int = 5, batch_size: int = 50) -> float:
    """Train and return the accuracy on the test images."""
    data = cv.load_dataset("digits", valid=None)
    layers = (cv.Conv2d(1, 16, 3, padding=1), cv.ReLU(), cv.MaxPool2d(2), cv.Flatten(), cv.Dense(256, data.num_classes))
    model = cv.Model(data.input_shape, layers)
    executor = cv.engines.Im2col(threads=1).executor(model, None, cv.Recipe(precision="fp32", seed=0))
    optimizer, loss = cv.SGD(lr=0.05, momentum=0.9), cv.CrossEntropy()
    order = np.random.default_rng(0)

    for epoch in range(epochs):
        total = 0.0
        for indices in np.array_split(order.permutation(len(data.train)), len(data.train) // batch_size):
            images, labels = data.train.images[indices], data.train.labels[indices]
            executor.zero_grads()
            result = executor.loss_and_grads(images, labels, loss, scale=1 / len(indices))  # losses are sums
            norm = executor.grad_norm()
            executor.update(replace(optimizer, lr=optimizer.lr * 0.8**epoch))
            total += result.loss
        print(f"epoch {epoch + 1}: loss {total / len(data.train):.4f}, last gradient {norm:.3f}")

    return cv.evaluate(executor, data.test, loss).accuracy


if __name__ == "__main__":
    print(f"test accuracy {train(int(sys.argv[1]) if len(sys.argv) > 1 else 5):.2%}")
