"""The chat as a person types it into a terminal, and as a script pipes questions into it."""

import json
import os
import re
import signal
import stat
import subprocess
import sys

import chat_terminal
import pytest
from chat_terminal import ALT_ENTER, CTRL_C, CTRL_D, PASTE, PROMPT, UP, Terminal
from click.testing import CliRunner
from terminal_output import control_characters

from saigakit import cli, export, infer
from saigakit.core import install
from saigakit.data.schema import normalise_record
from saigakit.prompt import template
from saigakit.registry import MODELS

SYSTEM = MODELS["saiga_tiny"].system_prompt
GREEDY = ("--n-ctx", "256", "--temperature", "0")
SMALL = ("--n-ctx", "256", "--system", "")


@pytest.fixture(scope="module")
def gguf_file(tiny, tmp_path_factory):
    output = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return export.to_gguf(model="saiga_tiny", adapter="released", output=output, quant_type="Q8_0")


@pytest.fixture(scope="module")
def chats(gguf_file):
    with chat_terminal.chats(gguf_file) as chats:
        yield chats


@pytest.fixture
def home(tmp_path):
    return {"XDG_STATE_HOME": str(tmp_path / "state")}


def roles_and_texts(file):
    return [(one["role"], one["content"]) for one in json.loads(file.read_text(encoding="utf-8"))["messages"]]


def questions(file):
    return [text for role, text in roles_and_texts(file) if role == "user"]


def ask(terminal: Terminal, text: str) -> str:
    terminal.type(text, "\r")
    return terminal.expect(PROMPT)


def leave(terminal: Terminal) -> str:
    terminal.type("/bye\r")
    return terminal.read_to_the_end()


def test_a_paste_of_many_lines_is_one_question(chats, home, tmp_path):
    with chats.start(*SMALL, env=home) as terminal:
        ask(terminal, PASTE.format("раз\n\n\tдва\r\nтри"))
        ask(terminal, f"/save {tmp_path / 'a.json'}")
        leave(terminal)
    assert questions(tmp_path / "a.json") == ["раз\n\n\tдва\nтри"]


def test_alt_enter_adds_a_line(chats, home, tmp_path):
    with chats.start(*SMALL, env=home) as terminal:
        ask(terminal, f"раз{ALT_ENTER}два")
        ask(terminal, f"/save {tmp_path / 'a.json'}")
        leave(terminal)
    assert questions(tmp_path / "a.json") == ["раз\nдва"]


def test_an_empty_line_is_ignored(chats, home, tmp_path):
    with chats.start(*SMALL, env=home) as terminal:
        for text in ("", "", "  ", "да", f"/save {tmp_path / 'a.json'}"):
            ask(terminal, text)
        leave(terminal)
    assert questions(tmp_path / "a.json") == ["да"]


@pytest.mark.parametrize("how", ["/bye\r", CTRL_D])
def test_bye_and_ctrl_d_leave(chats, home, how):
    with chats.start(*SMALL, env=home) as terminal:
        terminal.type(how)
        assert "error" not in terminal.read_to_the_end()


def test_ctrl_c_clears_the_line_and_does_not_leave(chats, home, tmp_path):
    with chats.start(*SMALL, env=home) as terminal:
        terminal.type("never asked", CTRL_C)
        terminal.expect(PROMPT)
        terminal.type(CTRL_C)
        terminal.expect(PROMPT)
        ask(terminal, "да")
        ask(terminal, f"/save {tmp_path / 'a.json'}")
        leave(terminal)
    assert questions(tmp_path / "a.json") == ["да"]


def test_ctrl_c_stops_an_answer_whose_beginning_stays_and_other_keys_are_discarded(chats, home, tmp_path):
    with chats.start(*SMALL, env=home, pause_s=0.05) as terminal:
        terminal.type("Привет\r")
        terminal.expect("текста")
        terminal.type("ZZ\rtouch Z\r", PASTE.format("ZZ\nZZ"), "\x1b", CTRL_C)
        assert "Z" not in terminal.expect(" …\r\n")
        terminal.expect(PROMPT)
        ask(terminal, f"/save {tmp_path / 'a.json'}")
        leave(terminal)
    [(_, question), (_, answer)] = roles_and_texts(tmp_path / "a.json")
    assert question == "Привет" and answer.endswith(" …") and len(answer) > 2


def test_help_names_every_command_and_the_file_of_the_history(chats, home, tmp_path):
    with chats.start(*SMALL, env=home) as terminal:
        shown = ask(terminal, "/help")
        leave(terminal)
    assert all(f"\n{name}" in shown for name in ("/system TEXT", "/reset", "/save FILE", "/load FILE", "/bye", "//"))
    assert re.search(r"kept in \S*/state/saigakit/chat_history", shown.replace("\r\n", ""))


def test_an_unknown_command_is_not_asked_and_two_slashes_ask_one(chats, home, tmp_path):
    with chats.start("--system", "", env=home) as terminal:
        assert "error: '/delete' is not a command; /help lists them." in ask(terminal, "/delete all")
        ask(terminal, "//delete all")
        ask(terminal, "// a comment")
        ask(terminal, f"/save {tmp_path / 'a.json'}")
        leave(terminal)
    assert questions(tmp_path / "a.json") == ["/delete all", "// a comment"][-len(questions(tmp_path / "a.json")) :]


def test_system_shows_sets_and_removes_the_system_prompt(chats, home):
    with chats.start("--n-ctx", "256", env=home) as terminal:
        assert f"system: {SYSTEM}"[:60] in ask(terminal, "/system")
        assert "system: Отвечай: да." in ask(terminal, "/system Отвечай: да.")
        assert "There is no system prompt." in ask(terminal, '/system ""')
        leave(terminal)


def test_a_saved_conversation_is_a_record_and_is_continued_after_load(chats, home, tmp_path):
    file = tmp_path / "my chat.json"
    with chats.start("--n-ctx", "256", "--system", "Да", env=home) as terminal:
        assert "There is nothing to save yet." in ask(terminal, f"/save {file}")
        ask(terminal, "раз")
        assert f"save: {file}, 1 turn" in ask(terminal, f"/save {file}").replace("\r\n", "")
        assert "already exists; nothing was overwritten" in ask(terminal, f"/save {file}")
        assert "needs the name of a file" in ask(terminal, "/load")
        leave(terminal)
    before = roles_and_texts(file)
    assert not isinstance(normalise_record(json.loads(file.read_text(encoding="utf-8"))), tuple)
    with chats.start(*SMALL, env=home) as terminal:
        assert ", 1 turn" in ask(terminal, f"/load {file}")
        ask(terminal, f"/save {tmp_path / 'again.json'}")
        ask(terminal, "/reset")
        assert "There is nothing to save yet." in ask(terminal, f"/save {tmp_path / 'empty.json'}")
        leave(terminal)
    assert roles_and_texts(tmp_path / "again.json") == before
    assert [path.name for path in tmp_path.glob("*.json*")].count("empty.json") == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not the JSON of one conversation: Expecting"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "the last message is of user; end with one of the"),
        ('{"messages": [{"role": "wizard", "content": "a"}]}', "messages[0]"),
        ('{"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}], '
         '"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}', "has none"),
        (None, "No such file"),
    ],
    ids=["no JSON", "no answer", "no role", "tools", "no file"],
)  # fmt: skip
def test_load_says_what_is_wrong(chats, home, tmp_path, content, message):
    if content is not None:
        (tmp_path / "bad").write_text(content, encoding="utf-8")
    with chats.start(*SMALL, env=home) as terminal:
        shown = ask(terminal, f"/load {tmp_path / 'bad'}").replace("\r\n", "")
        leave(terminal)
    assert "error: " in shown and message in shown


def test_the_history_is_private_and_there_in_the_next_session(chats, home, tmp_path):
    with chats.start(*SMALL, env=home) as terminal:
        ask(terminal, PASTE.format("раз\nhf_abcdefghijklmnopqrstuvwxyz"))
        leave(terminal)
    file = tmp_path / "state" / "saigakit" / "chat_history"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and "hf_" not in file.read_text(encoding="utf-8")
    with chats.start(*SMALL, env=home) as terminal:
        terminal.type(UP, UP, "\r")  # over /bye
        terminal.expect(PROMPT)
        ask(terminal, f"/save {tmp_path / 'a.json'}")
        leave(terminal)
    assert questions(tmp_path / "a.json") == ["раз\n…"]


def test_a_history_that_cannot_be_written_is_done_without(chats, tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with chats.start(*SMALL, env={"XDG_STATE_HOME": str(tmp_path / "file")}) as terminal:
        assert f"kept in {os.devnull}." in ask(terminal, "/help").replace("\r\n", "")
        leave(terminal)


def test_the_context_is_shown_and_its_oldest_turns_are_forgotten(chats, home, tmp_path):
    old = [("system", "Да"), *[("user", "слово " * 6), ("assistant", "слово " * 6)] * 3]
    record = {"messages": [{"role": role, "content": text} for role, text in old]}
    (tmp_path / "old.json").write_text(json.dumps(record), encoding="utf-8")
    with chats.start(*SMALL, env=home) as terminal:
        screens = terminal.seen, ask(terminal, f"/load {tmp_path / 'old.json'}")
        before, after = (int(re.search(r"(\d+) of 256 tokens", screen)[1]) for screen in screens)
        assert before < 60 and after > before + 100
        assert "Forgot the" in (shown := ask(terminal, "слово " * 12)) and "the context is full." in shown
        ask(terminal, f"/save {tmp_path / 'a.json'}")
        leave(terminal)
    kept = roles_and_texts(tmp_path / "a.json")
    assert kept[0] == ("system", "Да") and kept[1][0] == "user" and ("user", ("слово " * 12).rstrip()) in kept
    assert len(kept) < 1 + 6 + 2


def test_a_question_over_the_context_is_an_error_and_forgets_nothing(chats, home, tmp_path):
    with chats.start(*SMALL, env=home) as terminal:
        ask(terminal, "да")
        assert "but the context holds 256" in ask(terminal, "слово " * 100)
        ask(terminal, f"/save {tmp_path / 'a.json'}")
        leave(terminal)
    assert questions(tmp_path / "a.json") == ["да"]


def test_nothing_of_a_paste_reaches_the_shell(gguf_file, home, tmp_path):
    """The real command, started by a real shell; the input that follows /bye at once is the worst case."""
    ours, theirs = chat_terminal.pair()
    environment = {**os.environ, **chat_terminal.ENVIRONMENT, **home, "PS1": "shell" + "$ "}
    command = ["bash", "--norc", "--noprofile", "-i"]
    options = {"stdin": theirs, "stdout": theirs, "stderr": theirs, "env": environment, "cwd": tmp_path}
    with subprocess.Popen(command, start_new_session=True, **options) as shell:
        os.close(theirs)
        terminal = Terminal(ours)
        terminal.type(f"{sys.executable} -m saigakit.cli chat missing.gguf\r", "touch early\r")
        terminal.expect("does not exist")
        terminal.type(f"{sys.executable} -m saigakit.cli chat {gguf_file} --n-ctx 256 --system ''\r")
        terminal.expect(PROMPT)
        terminal.type(PASTE.format("да\n\ntouch pasted\n"))
        ask(terminal, "")
        terminal.type("/bye\rtouch after\r", PASTE.format("touch last\n" * 200))
        terminal.expect("shell$ ")
        terminal.type("echo en''d; exit\r")
        terminal.expect("end")
        shell.wait(timeout=20)
    os.close(ours)
    assert {path.name for path in tmp_path.iterdir()} == {"state"}


def piped(gguf_file, text, *options, system=("--system", "")):
    done = CliRunner().invoke(cli.main, ["chat", str(gguf_file), *GREEDY, *system, *options], input=text)
    assert done.exit_code == 0, done.stderr
    return done


@pytest.fixture
def asked(monkeypatch):
    """The conversations that the model gets, instead of a real answer."""
    asked = []

    def answer(llm, messages, **_):
        asked.append([(message["role"], message["content"]) for message in messages])
        yield "да"

    monkeypatch.setattr(infer, "stream", answer)
    return asked


def test_the_system_prompt_of_the_file_is_used_and_shown(gguf_file, one_thread):
    done = piped(gguf_file, "Привет\n", system=())
    assert f"system: {SYSTEM}" in done.stderr
    assert done.stdout != piped(gguf_file, "Привет\n").stdout


def test_all_of_a_pipe_is_one_question(gguf_file, asked):
    done = piped(gguf_file, "/reset\n\nдва\n")
    assert asked == [[("user", "/reset\n\nдва")]] and done.stdout == "да\n" and done.stderr == ""


def test_each_line_of_a_pipe_is_a_question_of_one_conversation(gguf_file, asked):
    piped(gguf_file, "a\n\n  \nb", "--lines", system=("--system", "S"))
    assert asked[1:] == [[("system", "S"), ("user", "a"), ("assistant", "да"), ("user", "b")]]


def test_a_line_over_the_context_is_reported_and_the_next_is_answered(gguf_file, one_thread):
    done = piped(gguf_file, "слово " * 100 + "\nПривет\n", "--lines")
    assert "the context holds 256" in done.stderr and "Forgot" not in done.stderr
    assert done.stdout == piped(gguf_file, "Привет\n").stdout


@pytest.mark.parametrize("options", [(), ("--lines",)])
@pytest.mark.parametrize("text", ["", "\n \n"])
def test_an_empty_pipe_is_an_error(gguf_file, text, options):
    done = CliRunner().invoke(cli.main, ["chat", str(gguf_file), *GREEDY, *options], input=text)
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.endswith("error: Standard input is empty: there is no question.\n")


def test_a_piped_question_over_the_context_ends_with_status_1(gguf_file):
    done = CliRunner().invoke(cli.main, ["chat", str(gguf_file), *GREEDY], input="слово " * 100)
    assert done.exit_code == 1 and "but the context holds 256" in done.stderr


def test_ctrl_c_ends_an_answer_to_a_pipe_with_status_130(gguf_file, monkeypatch):
    def interrupted(llm, messages, **_):
        yield "да"
        os.kill(os.getpid(), signal.SIGINT)
        yield "нет"

    monkeypatch.setattr(infer, "stream", interrupted)
    done = CliRunner().invoke(cli.main, ["chat", str(gguf_file), *GREEDY], input="a")
    assert done.exit_code == 130


@pytest.fixture(scope="module")
def bare(gguf_file, tmp_path_factory):
    """The file with another name for the key of its chat template."""
    file = tmp_path_factory.mktemp("bare") / "bare.gguf"
    file.write_bytes(gguf_file.read_bytes().replace(b"tokenizer.chat_template", b"tokenizer.chat_templatx"))
    return file


def test_a_file_without_a_chat_template_is_refused_with_what_to_do(bare):
    done = CliRunner().invoke(cli.main, ["chat", str(bare), *GREEDY], input="Привет")
    assert done.exit_code == 1
    assert "This GGUF has no chat template. Give one: saigakit chat FILE --chat-template chatml\n" in done.stderr


def test_a_chat_template_can_be_given_by_name_or_as_a_file(bare, gguf_file, tmp_path, one_thread):
    expected = piped(gguf_file, "Привет").stdout
    assert piped(bare, "Привет", "--chat-template", "saiga2").stdout == expected
    other = template.find_chat_template("saiga2").replace("<s>bot", "<s>human")
    (tmp_path / "own.jinja").write_text(other, encoding="utf-8")
    assert piped(bare, "Привет", "--chat-template", str(tmp_path / "own.jinja")).stdout != expected
    done = CliRunner().invoke(cli.main, ["chat", "no.gguf", "--chat-template", "nothing"], input="Привет")
    assert done.exit_code == 1 and "chat_template='nothing' is unknown" in done.stderr


def test_a_piped_chat_needs_no_module_that_windows_lacks_and_no_prompt_toolkit(gguf_file):
    lacking = ("fcntl", "pty", "termios", "tty", "readline", "resource", "pwd", "prompt_toolkit")
    code = f"import sys; sys.modules |= dict.fromkeys({lacking}); from saigakit import cli; cli.main()"
    command = [sys.executable, "-c", code, "chat", str(gguf_file), *GREEDY]
    done = subprocess.run(command, input="Привет\n".encode(), capture_output=True, check=False, timeout=60)
    assert done.returncode == 0 and done.stdout, done.stderr.decode()


def test_without_prompt_toolkit_a_terminal_says_how_to_install_it(tmp_path):
    ours, theirs = chat_terminal.pair()
    code = "import sys; sys.modules['prompt_toolkit'] = None; from saigakit import cli; cli.main()"
    streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    with subprocess.Popen([sys.executable, "-c", code, "chat", str(tmp_path)], **streams):
        os.close(theirs)
        shown = Terminal(ours).read_to_the_end()
    os.close(ours)
    command = install.pip_install(["all"])
    assert f"error: prompt_toolkit is not installed. Run: {command}" in shown.replace("\r\n", "").strip()


def test_what_an_answer_contains_is_not_obeyed_by_the_terminal(chats, home, tmp_path):
    with chats.start(*SMALL, env=home) as terminal:
        ask(terminal, PASTE.format("раз\nдва\n\nтри"))
        answer = terminal.seen.split("\x1b[?2004l")[1].split("\x1b[6n")[0]  # between two prompts
        ask(terminal, f"/save {tmp_path / 'a.json'}")
        leave(terminal)
    [_, (_, kept)] = roles_and_texts(tmp_path / "a.json")
    assert control_characters(kept.encode()) and control_characters(answer.encode()) == {"\r"}
