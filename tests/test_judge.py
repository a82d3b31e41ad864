"""judge.py: prompts of FastChat's format, requests that fail, nothing judged twice."""

import email.utils
import json
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import eval as evaluation
import judge
from common import UserError
from test_eval import CHAT, fails, lines, run

PARTS = "Q {question} A {answer}", "Q {question_1} {question_2} A {answer_1} {answer_2}"
PROMPTS = {
    "single-v1": PARTS[0],
    "single-math-v1": PARTS[0] + " R {ref_answer_1}",
    "single-v1-multi-turn": PARTS[1],
    "single-math-v1-multi-turn": PARTS[1] + " R {ref_answer_1} {ref_answer_2}",
}


def prompt_rows(**changes):
    """Rows of FastChat's judge_prompts.jsonl, with another one among them."""
    rows = [{"name": "pair-v2", "type": "pairwise", "system_prompt": "s", "prompt_template": "{x}"}]
    for name, text in {**PROMPTS, **changes}.items():
        row = {"name": name, "type": "single", "system_prompt": f"system of {name}"}
        rows.append(row | {"prompt_template": text, "output_format": "[[rating]]"})
    return rows


def test_grades_are_read_as_fastchat_reads_them():
    assert judge.parse_score("Good.\nRating: [[7.5]]") == 7.5
    assert judge.parse_score("Rating: [3]") == 3.0
    assert judge.parse_score("[[4]] rather than [[9]]") == 4.0
    assert judge.parse_score("Rating: [[11]]") is None and judge.parse_score("seven") is None


def test_prompts_from_a_file(write_jsonl):
    path = write_jsonl("judge_prompts.jsonl", prompt_rows())
    prompts, name = judge.read_prompts(path)
    assert name.startswith("judge_prompts.jsonl ") and len(name.split()[1]) == 8
    question = {"category": "math", "turns": ["one?", "two {answer}?"], "reference": ["r1", "r2"]}
    answers = ["a {question} b", "c"]

    def ask(turn, **changes):
        messages = judge.judge_messages(prompts, question | changes, answers, turn)
        assert [message["role"] for message in messages] == ["system", "user"]
        return tuple(message["content"] for message in messages)

    assert ask(0) == ("system of single-math-v1", "Q one? A a {question} b R r1")
    both = "Q one? two {answer}? A a {question} b c"
    assert ask(1) == ("system of single-math-v1-multi-turn", f"{both} R r1 r2")
    assert ask(1, category="writing") == ("system of single-v1-multi-turn", both)
    assert ask(1, reference=["r1"])[0] == "system of single-v1-multi-turn"
    assert ask(0, reference=[]) == ("system of single-v1", "Q one? A a {question} b")


def test_wrong_prompt_files_are_named(tmp_path, write_jsonl, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    flags = f"--tasks mt_bench={write_jsonl('chat.jsonl', CHAT)} --judge x --judge_prompts "
    for rows, message in (
        (prompt_rows()[:3], "has no prompt 'single-v1-multi-turn'"),
        (prompt_rows(**{"single-v1": 3}), "has no prompt 'single-v1'"),
        (prompt_rows(**{"single-v1": "{question_2}"}), "single-v1 has a field {question_2}"),
        (prompt_rows(**{"single-v1": "{ref_answer_1}"}), "single-v1 has a field {ref_answer_1}"),
        ([1], "row 1: expected an object"),
    ):
        error = fails(capsys, tmp_path / "run", flags + write_jsonl("prompts.jsonl", rows))
        assert "prompts.jsonl" in error and message in error
    assert "none.jsonl" in fails(capsys, tmp_path / "run", f"{flags}{tmp_path}/none.jsonl")
    assert not (tmp_path / "run").exists()


@pytest.fixture()
def endpoint(monkeypatch):
    """A server that speaks the protocol here -> (requests, faults to serve first)."""
    requests, faults, lock = [], [], threading.Lock()

    def completion(text):
        return json.dumps({"choices": [{"message": {"content": text}}]}).encode()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                requests.append({"path": self.path, "key": self.headers["Authorization"], **body})
                fault = faults.pop(0) if faults else None
            headers, status, reply = {}, 200, completion("Fine.\nRating: [[8]]")
            if fault == "timeout":
                time.sleep(0.5)
            elif fault == "malformed":
                reply = b'{"choices": [{"mess'
            elif fault == "empty":
                reply = b'{"choices": []}'
            elif fault == "cut":
                headers["Content-Length"] = "10000"
            elif fault == "unscored":
                reply = completion("I would rather not say.")
            elif fault:
                status, headers = fault if isinstance(fault, tuple) else (fault, {})
                reply = b'{"error": {"message": "busy"}}'
            try:
                self.send_response(status)
                for key, value in {"Content-Length": str(len(reply)), **headers}.items():
                    self.send_header(key, value)
                self.end_headers()
                self.wfile.write(reply)
            except OSError:
                pass  # the client gave up

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_port}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setattr(judge, "FIRST_WAIT", 0.01)
    yield requests, faults
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("fault", [429, 500, 503, "timeout", "malformed", "empty", "cut"])
def test_faults_are_tried_again(endpoint, monkeypatch, fault):
    requests, faults = endpoint
    faults += [fault, fault]
    monkeypatch.setattr(judge, "TIMEOUT", 0.3)
    assert "[[8]]" in judge.ask("judge", [], os.environ["OPENAI_BASE_URL"], "secret")
    assert len(requests) == 3
    assert requests[0]["path"] == "/v1/chat/completions"
    assert requests[0]["key"] == "Bearer secret"


def test_waits_double_or_follow_the_server(endpoint):
    requests, faults = endpoint
    soon = email.utils.formatdate(time.time() + 30, usegmt=True)
    later = [{"Retry-After": value} for value in ("7", soon, "soon")]
    faults += [500, (429, later[0]), (429, later[1]), (503, later[2])]
    waits = []
    judge.ask("judge", [], os.environ["OPENAI_BASE_URL"], None, sleep=waits.append)
    assert waits[0] == 0.01
    assert waits[1] == 7.0
    assert 25 < waits[2] <= 30
    assert waits[3] == 0.08
    assert requests[0]["key"] is None


def test_refused_requests_are_not_repeated(endpoint):
    requests, faults = endpoint
    faults += [401]
    with pytest.raises(UserError, match="HTTP 401.*busy"):
        judge.ask("judge", [], os.environ["OPENAI_BASE_URL"], "wrong")
    assert len(requests) == 1
    faults += [500] * judge.ATTEMPTS
    with pytest.raises(UserError, match=f"no answer in {judge.ATTEMPTS} tries.*HTTP 500"):
        judge.ask("judge", [], os.environ["OPENAI_BASE_URL"], "secret", sleep=lambda _: None)


ADDRESSES = [
    ("nonsense", "no http:// or https:// address"),
    ("file:///etc/passwd", "no http:// or https:// address"),
    ("ftp://host/v1", "no http:// or https:// address"),
    ("http://", "no http:// or https:// address"),
    ("http://:80/v1", "no http:// or https:// address"),
    ("http://host:port/v1", "no http:// or https:// address"),
    ("http://[::1/v1", "no http:// or https:// address"),
    ("http://ho st/v1", "no http:// or https:// address"),
    ("http://h\u00f6st/v1", "no http:// or https:// address"),
    ("http://me:hunter2@127.0.0.1:9/v1", "holds a user, a password"),
    ("http://hunter2@127.0.0.1:9/v1", "holds a user, a password"),
    ("http://127.0.0.1:9/v1?key=hunter2", "holds a user, a password"),
]


@pytest.mark.parametrize("address, message", ADDRESSES)
def test_judge_addresses_are_checked_first(
    tmp_path, write_jsonl, monkeypatch, capsys, address, message
):
    monkeypatch.setenv("OPENAI_BASE_URL", address)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    flags = ["--tasks", f"mt_bench={write_jsonl('chat.jsonl', CHAT)}", "--judge", "judge"]
    error = fails(capsys, tmp_path / "run", *flags)
    assert "OPENAI_BASE_URL: " in error and message in error
    assert "hunter2" not in error and "sk-secret" not in error
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\n")
    error = fails(capsys, tmp_path / "run", *flags)
    assert "OPENAI_API_KEY: holds" in error and "sk-secret" not in error


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
@pytest.mark.parametrize(
    "target", ["http://localhost:{}/x", "file:///etc/me:hunter2@x", "http://["]
)
def test_redirects_are_not_followed(endpoint, code, target):
    requests, faults = endpoint
    port = os.environ["OPENAI_BASE_URL"].split(":")[2].split("/")[0]
    faults += [(code, {"Location": target.format(port)})]
    with pytest.raises(UserError, match=f"HTTP {code} redirects to .*not followed") as error:
        judge.ask("judge", [], os.environ["OPENAI_BASE_URL"], "secret")
    assert len(requests) == 1
    assert "hunter2" not in str(error.value) and "secret" not in str(error.value)


def test_nothing_is_judged_twice(tmp_path, write_jsonl, endpoint, monkeypatch, capsys):
    requests, faults = endpoint
    chat = write_jsonl("chat.jsonl", CHAT)
    flags = ["--tasks", f"mt_bench={chat}", "--max_new_tokens", "4", "--judge", "judge/x"]
    monkeypatch.setattr(judge, "JUDGE_THREADS", 1)

    def generate(model, tokenizer, prompts, *_):
        return [(f"text {len(prompt)}", False) for prompt in prompts]

    monkeypatch.setattr(evaluation, "generate", generate)
    # the tenth request is refused: the command stops, with the time to notice it
    faults += [None] * 9 + [400] + ["timeout"] * 5
    assert "HTTP 400" in fails(capsys, tmp_path / "run", *flags)
    assert 10 <= len(requests) < 15  # those on their way are kept, the others not sent
    faults.clear()
    assert not (tmp_path / "run" / "results.json").exists()
    # one judgement stays without a score, one gets it at the second asking
    faults += ["unscored", "unscored", "unscored", None]
    result = run(tmp_path / "run", *flags)["tiny"]["mt_bench"]
    judged = lines(tmp_path / "run" / "judgements" / "judge-x" / "tiny.jsonl")
    keys = {line["key"] for line in judged}
    assert len(judged) == len(keys) == 25  # (2 + 2 + 1) answers x 5 rounds
    # each once; the refused one; one more for each of the two without a score at first
    assert len(requests) == 25 + 1 + 2
    assert result["score"] == 8.0
    assert result["rounds"] == 5
    assert result["unscored"] == 1
    assert result["judge"] == "judge/x"
    assert result["judge_prompts"] == "ours"
    assert result["score_turn2"] == 8.0
    before = len(requests)
    assert run(tmp_path / "run", *flags)["tiny"]["mt_bench"] == result and len(requests) == before
    assert run(tmp_path / "run", *flags, "--rounds", "6")["tiny"]["mt_bench"]["rounds"] == 6
    assert len(requests) == before + 5
    assert {(request["model"], request["temperature"]) for request in requests} == {("judge/x", 0)}
    texts = {request["messages"][1]["content"] for request in requests}
    with_reference = [text for text in texts if "[reference" in text]
    assert len(with_reference) == 2  # both turns of the math question, no other
    assert all("2 + 3" in text for text in with_reference)
    second = next(text for text in with_reference if "to the second message" in text)
    assert "ten" in second
    assert "five" not in second
    answers = [second.index(f"[assistant, {which} answer]") for which in ("first", "second")]
    assert answers[0] < second.index("Double it.") < answers[1]


def test_other_prompts_are_other_judgements(tmp_path, write_jsonl, endpoint, monkeypatch):
    requests, _ = endpoint
    monkeypatch.setattr(evaluation, "generate", lambda *args: [("a", False)] * len(args[2]))
    chat, prompts = write_jsonl("chat.jsonl", CHAT), write_jsonl("prompts.jsonl", prompt_rows())
    flags = f"--tasks mt_bench={chat} --judge j --rounds 1"
    assert run(tmp_path / "run", flags)["tiny"]["mt_bench"]["judge_prompts"] == "ours"
    result = run(tmp_path / "run", f"{flags} --judge_prompts {prompts}")["tiny"]["mt_bench"]
    assert result["judge_prompts"].startswith("prompts.jsonl ")
    assert len(requests) == 5 + 5
    systems = {request["messages"][0]["content"] for request in requests[5:]}
    assert systems == {f"system of {name}" for name in PROMPTS}


def test_references_from_a_second_file(tmp_path, write_jsonl, endpoint, monkeypatch):
    """FastChat's reference_answer/gpt-4.jsonl."""
    requests, _ = endpoint
    monkeypatch.setattr(evaluation, "generate", lambda *args: [("a", False)] * len(args[2]))
    chat, prompts = write_jsonl("chat.jsonl", CHAT), write_jsonl("prompts.jsonl", prompt_rows())
    answer = {"question_id": 9, "choices": [{"index": 0, "turns": ["gpt five", "gpt ten"]}]}
    answers = write_jsonl("gpt-4.jsonl", [answer])
    flags = f"--tasks mt_bench={chat},{answers} --judge j --rounds 1 --judge_prompts {prompts}"
    run(tmp_path / "run", flags)
    texts = [request["messages"][1]["content"] for request in requests]
    assert sum("R gpt five" in text for text in texts) == 2
