import logging

from convolt.cli.options import telling_of_compilation
from convolt.engine import COMPILING


def compile_some(patience: float, quiet: bool = False) -> None:
    with telling_of_compilation(quiet, patience, interval=0):
        logging.getLogger(COMPILING).info("compiling kernels %d/%d %s", 12, 43, "conv_forward")


def test_a_long_compilation_is_told_on_stderr(capsys):
    compile_some(patience=0)
    assert capsys.readouterr() == ("", "compiling kernels 12/43 ...\n")


def test_a_short_one_is_not_nor_is_anything_where_quiet_was_asked_for(capsys):
    compile_some(patience=3600)
    compile_some(patience=0, quiet=True)
    logging.getLogger(COMPILING).info("compiling kernels %d/%d %s", 12, 43, "conv_forward")
    assert capsys.readouterr() == ("", "")
