"""Mistakes in bringing matrices into the order of pixels and back."""

from jit_mutant import JitMutant

ORDER, REORDER, EXECUTOR = "order.py", "kernels/reorder.py", "executor.py"
PIXELS, IN_BF16 = "matrices in the order of pixels", "matrices in the order of pixels, bf16"
BACK = "self._in_order(state=False)"

NONE = "self._order.restore_gradient(programs.of_pixels)"
ALL_BACK = "self._in_order()"

ORDERED = (
    JitMutant("a row left out", REORDER, "def reorder", "* rows, outputs)", "* rows, outputs - 1)", PIXELS),
    JitMutant("the other way round", REORDER, "def reorder", "if spec.to_pixels", "if not spec.to_pixels", PIXELS),
    JitMutant("half of a row", REORDER, "def reorder", "range(inputs)", "range(inputs // 2)", PIXELS),
    JitMutant("weights unmoved", ORDER, "class Order", "[self._params.flat])", "[])", PIXELS),
    JitMutant("state unmoved", ORDER, "class Order", "list(self._updater.state.values())", "[]", PIXELS),
    JitMutant("never back", ORDER, "class Order", "before.keys() ^ behind.keys()", "behind.keys()", PIXELS),
    JitMutant("state never back", ORDER, "class Order", "{} if state else self.now", "self.now", PIXELS),
    JitMutant("state of before", ORDER, "def forget_state", "_replace(state={})", "_replace()", PIXELS),
    JitMutant("any format", "matrices.py", "def readers_of_pixels", "if bare and alike and", "if bare and", IN_BF16),
    JitMutant("slopes of features", "plan.py", "def slope", "return self.slope(tensor.image)", "pass", PIXELS),
    JitMutant("flattened too", "programs.py", "class Programs", "if operation.output in flat", "if False", PIXELS),
    JitMutant("a gradient as it lies", EXECUTOR, "def _judged", NONE, "pass", PIXELS),
    JitMutant("weights as they lie", EXECUTOR, "def params", f"{BACK}\n        return", "return", PIXELS),
    JitMutant("predictions as they lie", EXECUTOR, "def _logits", BACK, "pass", PIXELS),
    JitMutant("forward as they lie", EXECUTOR, "def loss_and_grads", f"{BACK}\n        self._l", "self._l", PIXELS),
    JitMutant("moved as they lie", EXECUTOR, "def update", f"{ALL_BACK}\n        self._up", "self._up", PIXELS),
    JitMutant("state as it lies", EXECUTOR, "def optimizer_state", f"{ALL_BACK}\n        ret", "ret", PIXELS),
    JitMutant(
        "closed as they lie", EXECUTOR, "def close", f"{ALL_BACK}\n        finally", "pass\n        finally", PIXELS
    ),
    JitMutant("carried as they lie", EXECUTOR, "def move", f"{ALL_BACK}\n        self._par", "self._par", PIXELS),
    JitMutant("one version", ORDER, "class Order", "now.version + (weights != now.weights)", "now.version", IN_BF16),
    JitMutant("come for ever", ORDER, "class Order", "self._arrived[0] = 0", "pass", PIXELS),
    JitMutant("come at once", ORDER, "class Order", "if self._arrived[0]:", "if True:", PIXELS),
    JitMutant("vectors of", ORDER, "class Order", "(address_of(vector), *rest)", "tuple(rest)", PIXELS),
)
