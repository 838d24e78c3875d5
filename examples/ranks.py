"""Several processes share every batch of a training: the digits, on as many ranks as mpiexec starts.

    mpiexec -n 2 python -m mpi4py examples/ranks.py [epochs]

Every rank runs this file. What is printed at the end does not depend on their number.
"""

import sys
import tempfile

import convolt as cv


def train(epochs: int = 3) -> float:
    """Train and return the accuracy on the test images, on every rank the same."""
    comm = cv.world()
    data = cv.load_dataset("digits")
    model = cv.zoo.mnist_cnn(data.input_shape, data.num_classes)
    with tempfile.TemporaryDirectory() as folder:  # rank 0 writes the run there; the others leave theirs empty
        run = cv.fit(
            model,
            data,
            cv.Recipe(epochs=epochs, batch_size=64, optimizer=cv.Adam(lr=3e-3)),
            engine=cv.engines.Im2col(threads=1),
            comm=comm,
            parallel=cv.Parallel(shard_optimizer=True),
            root=folder,
        )
    accuracy = run.test_accuracy
    assert accuracy is not None
    if comm.rank == 0:
        print(f"test accuracy {accuracy:.4f}")
    return accuracy


if __name__ == "__main__":
    train(*map(int, sys.argv[1:2]))
