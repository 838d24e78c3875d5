"""Mistakes in bringing matrices into the order of pixels and back."""

from jit_mutant import JitMutant

ORDER, REORDER, EXECUTOR = "order.py", "kernels/reorder.py", "executor.py"
PIXELS, IN_BF16 = "matrices in the order of pixels", "matrices in the order of pixels, bf16"
BACK = "self._in_order(state=False)"

NONE = "self._order.restore_gradient(programs.of_pixels)"
BRING = "self._version += self._order.bring(programs.of_pixels)\n        programs"
ALL_BACK = "self._in_order()"

ORDERED = (
    JitMutant("a row left out", REORDER, "def reorder", "* rows, outputs)", "* rows, outputs - 1)", PIXELS),
    JitMutant("the other way round", REORDER, "def reorder", "if spec.to_pixels", "if not spec.to_pixels", PIXELS),
    JitMutant("half of a row", REORDER, "def reorder", "range(inputs)", "range(inputs // 2)", PIXELS),
    JitMutant("weights unmoved", ORDER, "class Order", "[self._params.flat])", "[])", PIXELS),
    JitMutant("state unmoved", ORDER, "class Order", "list(self._updater.state.values())", "[]", PIXELS),
    JitMutant("never back", ORDER, "class Order", "before.keys() ^ behind.keys()", "behind.keys()", PIXELS),
    JitMutant("state never back", ORDER, "class Order", "{} if state else self._state", "self._state", PIXELS),
    JitMutant("state of before", ORDER, "def forget_state", "self._state = {}", "pass", PIXELS),
    JitMutant("any format", ORDER, "def readers_of_pixels", "if bare and alike and", "if bare and", IN_BF16),
    JitMutant("slopes of features", "plan.py", "def slope", "return self.slope(tensor.image)", "pass", PIXELS),
    JitMutant("flattened too", "programs.py", "class Programs", "if operation.output in flat", "if False", PIXELS),
    JitMutant("a gradient as it lies", EXECUTOR, "def _judged", NONE, "pass", PIXELS),
    JitMutant("weights as they lie", EXECUTOR, "def params", f"{BACK}\n        return", "return", PIXELS),
    JitMutant("predictions as they lie", EXECUTOR, "def _logits", BACK, "pass", PIXELS),
    JitMutant("forward as they lie", EXECUTOR, "def loss_and_grads", f"{BACK}\n        self._l", "self._l", PIXELS),
    JitMutant("moved as they lie", EXECUTOR, "def update", f"{ALL_BACK}\n        self._up", "self._up", PIXELS),
    JitMutant("state as it lies", EXECUTOR, "def optimizer_state", f"{ALL_BACK}\n        ret", "ret", PIXELS),
    JitMutant("closed as they lie", EXECUTOR, "def close", f"{ALL_BACK}\n        self._team", "self._team", PIXELS),
    JitMutant("carried as they lie", EXECUTOR, "def move", f"{ALL_BACK}\n        self._par", "self._par", PIXELS),
    JitMutant("copies of before", EXECUTOR, "def _in_order", "self._version += self._order", "self._order", IN_BF16),
    JitMutant("copies in no order", EXECUTOR, "def _at_once", BRING, f"{BRING[17:]}", IN_BF16),
)
