import subprocess
import sys

import click
import pytest

from convolt import cli
from convolt.errors import ConfigError, DataError


@pytest.fixture
def verb(monkeypatch):
    """Replaces the verb `doctor` by a command that calls the given function."""

    def replace(action):
        command = click.Command("doctor", callback=action)
        monkeypatch.setattr("convolt.cli.doctor.doctor", command)

    return replace


def raises(error: BaseException):
    def action():
        raise error

    return action


def test_help_lists_every_verb(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert [
        line.split()[0] for line in out.split("Commands:")[1].splitlines() if line.startswith("  ") and line[2] != " "
    ] == [*cli.VERBS]


def test_no_verb_shows_the_help(capsys):
    assert cli.main([]) == 2
    assert "Commands:" in capsys.readouterr().err


@pytest.mark.parametrize("name", cli.VERBS)
def test_verb_is_a_command_with_help(name, capsys):
    assert cli.main([name, "--help"]) == 0
    assert f"convolt {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["docter"], ["'docter'", "'doctor'", "convolt --help"]),
        (["doctor", "--jsn"], ["'--jsn'", "'--json'", "convolt doctor --help"]),
        (["--debgu"], ["'--debgu'", "'--debug'"]),
        (["doctor", "surplus"], ["surplus"]),
    ],
)
def test_usage_error_is_one_line_with_the_nearest_name(args, parts, capsys):
    assert cli.main(args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("convolt: error: ")
    assert err.count("\n") == 1
    assert all(part in err for part in parts)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("lr: must be >= 0; got -1"), 2, "lr: must be >= 0; got -1"),
        (DataError("file.npz: damaged:\n  bad header"), 1, "file.npz: damaged: bad header"),
        (FileNotFoundError(2, "No such file or directory", "x.png"), 1, "[Errno 2] No such file or directory: 'x.png'"),
        (click.BadParameter("not a number"), 2, "Invalid value: not a number See: convolt doctor --help"),
        (click.ClickException("no"), 1, "no"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (
            MemoryError("Unable to allocate 9 TiB"),
            1,
            f"out of memory (Unable to allocate 9 TiB); a smaller batch, images or layers need less: {cli.LESS_MEMORY}",
        ),
    ],
)
def test_error_is_one_line(verb, error, code, line, capsys):
    verb(raises(error))
    assert cli.main(["doctor"]) == code
    assert capsys.readouterr().err.strip() == f"convolt: error: {line}"


def test_debug_keeps_the_traceback(verb):
    verb(raises(DataError("damaged")))
    with pytest.raises(DataError, match="damaged"):
        cli.main(["--debug", "doctor"])


def test_defect_keeps_the_traceback(verb):
    verb(raises(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        cli.main(["doctor"])


def test_verb_chooses_its_exit_code(verb):
    verb(lambda: click.get_current_context().exit(75))
    assert cli.main(["doctor"]) == 75


def test_verb_without_a_code_succeeds(verb):
    verb(lambda: None)
    assert cli.main(["doctor"]) == 0


def test_reader_that_leaves_is_no_traceback():
    """What `convolt data list | head -1` does, with a pipe that is closed before anything is written."""
    script = "import sys; from convolt.cli import main; sys.stdin.readline(); sys.exit(main(['--help']))"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.close()
        _, err = process.communicate("go\n", timeout=60)
    assert (process.returncode, err) == (1, "")


def test_module_runs_as_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "convolt", "trian"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert done.stderr == "convolt: error: No such command 'trian'. Did you mean 'train'? See: convolt --help\n"


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("convolt, version ")
