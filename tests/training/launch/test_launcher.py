"""What the launcher says, and how words reach the nodes."""

import signal
import subprocess

import pytest

from training.launch.launcher import killed, quoted_for_nodes


@pytest.mark.parametrize(
    "word",
    [
        "plain",
        "it's",
        "a b",
        r"""{a,b} "quoted" \ `echo` $HOME %n""",
        '["a","b"]',
        "$HOME",
        "100%",
        "ü",
        "",
    ],
)
def test_a_word_survives_pdsh_deepspeed_and_a_shell(word: str) -> None:
    quoted = quoted_for_nodes(word)
    if " " in quoted:  # what DeepSpeed's PDSHRunner.parse_user_args does
        quoted = '"{}"'.format(quoted.replace('"', '\\"'))
    sent = quoted.replace("%%", "\x01").replace("%n", "0").replace("\x01", "%")  # pdsh
    ended = subprocess.run(["bash", "-c", f"printf %s {sent}"], capture_output=True, text=True)
    assert ended.stdout == word


def test_a_killed_process_is_explained() -> None:
    assert "SIGKILL: most often by the operating system, for lack of memory" in killed(9)
    assert "DEEPSPEED_TIMEOUT" in killed(signal.SIGABRT)
    assert killed(signal.SIGSEGV) == "A process of the run was ended by SIGSEGV"
