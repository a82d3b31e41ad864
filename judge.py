"""Grades for MT-Bench's answers (SFTMix §4.1), by any endpoint that speaks OpenAI's protocol.

The prompts are FastChat's, from a file of the user's (its judge_prompts.jsonl), or else our own in
the same form. Every judgement is kept under a key of all that it depends on: none is paid twice.
"""

from __future__ import annotations

import concurrent.futures
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from argparse import Namespace
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from pathlib import Path

from tqdm import tqdm

import data
from data import UserError
from predictions import Predictions, digest, line_key, safe_name

JUDGE_THREADS = 8  # requests at once
ATTEMPTS, FIRST_WAIT, LONGEST_WAIT, TIMEOUT = 6, 1.0, 60.0, 120.0  # tries; the others in seconds
BROKEN = (OSError, http.client.HTTPException, UnicodeDecodeError, json.JSONDecodeError)
BROKEN += (KeyError, IndexError, TypeError)  # replies that are tried again
REFERENCE_CATEGORIES = ("math", "reasoning", "coding")  # FastChat's rule

# Our own wording, by the names of FastChat's prompts for single answers
SYSTEM = (
    "You grade answers of an AI assistant. Be strict and impartial: judge how helpful, relevant, "
    "correct, deep and detailed an answer is for the person who asked, not how long it is."
)
GRADE = (
    "Grade the assistant's answer to the {} message below. First explain your grade in a few "
    "sentences{}. Then end with one line of the form `Rating: [[n]]`, where n is a whole number "
    "from 1 (useless) to 10 (could not be better)."
)
COMPARE = ", comparing the answer with the reference and naming its mistakes"
FIRST = "\n\n[user]\n{question}\n\n[assistant]\n{answer}"
BOTH = "\n\n[user, first message]\n{question_1}\n\n[assistant, first answer]\n{answer_1}"
BOTH += "\n\n[user, second message]\n{question_2}\n\n[assistant, second answer]\n{answer_2}"
OWN_PROMPTS = {
    "single-v1": GRADE.format("first", "") + FIRST,
    "single-math-v1": GRADE.format("first", COMPARE) + FIRST + "\n\n[reference]\n{ref_answer_1}",
    "single-v1-multi-turn": GRADE.format("second", "") + BOTH,
    "single-math-v1-multi-turn": GRADE.format("second", COMPARE)
    + BOTH
    + "\n\n[reference for the second answer]\n{ref_answer_2}",
}


# ---- Prompts -------------------------------------------------------------------------------------
def read_prompts(path: str | None) -> tuple[dict, str]:
    """FastChat's judge_prompts.jsonl, or None -> {name: (system, template)} and what to call them
    in results. Raises UserError."""
    if path is None:
        return {name: (SYSTEM, text) for name, text in OWN_PROMPTS.items()}, "ours"
    rows = {}
    for number, row in enumerate(data.read_jsonl(path, "--judge_prompts"), 1):
        data.check_object(row, f"{path}, row {number}")
        both = row.get("system_prompt"), row.get("prompt_template")
        rows[str(row.get("name"))] = both if all(isinstance(text, str) for text in both) else None
    for name in OWN_PROMPTS:
        if not rows.get(name):
            needs = "name, system_prompt and prompt_template, as in FastChat's judge_prompts.jsonl"
            raise UserError(f"--judge_prompts {path}: has no prompt {name!r} with {needs}")
        known = {"question", "answer", "question_1", "answer_1"}
        known |= {"ref_answer_1"} if "math" in name else set()
        known |= {f"{field[:-1]}2" for field in known if "multi" in name and field.endswith("1")}
        unknown = set(re.findall(r"{(\w+)}", rows[name][1])) - known
        if unknown:
            raise UserError(f"--judge_prompts {path}: {name} has a field {{{unknown.pop()}}}")
    prompts = {name: rows[name] for name in OWN_PROMPTS}
    return prompts, f"{Path(path).name} {digest(prompts)[:8]}"


def judge_messages(prompts: dict, question: dict, answers: list[str], turn: int) -> list[dict]:
    """-> chat messages that ask for a grade of the first (turn 0) or second answer, with the
    reference where the category has one. prompts: {name: (system, template)}."""
    references = question["reference"] if question["category"] in REFERENCE_CATEGORIES else []
    with_reference = len(references) > turn and bool(references[turn])
    name = f"single{'-math' * with_reference}-v1{'-multi-turn' * turn}"
    values = {"question": question["turns"][0], "answer": answers[0]}
    for i in range(turn + 1):
        values |= {f"question_{i + 1}": question["turns"][i], f"answer_{i + 1}": answers[i]}
    values |= {f"ref_answer_{i + 1}": text for i, text in enumerate(references)}
    system, template = prompts[name]
    text = re.sub(r"{(\w+)}", lambda field: values[field[1]], template)
    return [{"role": "system", "content": system}, {"role": "user", "content": text}]


def parse_score(text: str) -> float | None:
    """The grade in a judgement, [[n]] or [n] as FastChat reads it: 1 to 10, or None."""
    found = re.search(r"\[\[(\d+\.?\d*)\]\]", text) or re.search(r"\[(\d+\.?\d*)\]", text)
    return float(found[1]) if found and 1 <= float(found[1]) <= 10 else None


# ---- Requests ------------------------------------------------------------------------------------
class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: following it would carry the key to another host."""

    def http_error_302(self, *_) -> None:
        """Left to the handler that raises HTTPError."""

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


OPENER = urllib.request.build_opener(NoRedirect)


def redirected(url: str, error: urllib.error.HTTPError) -> str:
    """What a redirect says, without the address that it names: that may hold secrets."""
    try:
        target = urllib.parse.urljoin(url, error.headers.get("Location") or "")
        host = urllib.parse.urlsplit(target).hostname
    except ValueError:
        host = "an odd address"
    return (
        f"HTTP {error.code} redirects to {host}, not followed; set OPENAI_BASE_URL to the address"
    )


def judge_url(base_url: str, key: str | None) -> tuple[str, str]:
    """$OPENAI_BASE_URL and $OPENAI_API_KEY -> where to ask, and its host for messages. Raises
    UserError, which shows neither."""
    if key and not re.fullmatch("[!-~]+", key):
        raise UserError("OPENAI_API_KEY: holds a space, a line break or a letter beyond ASCII")
    try:
        parts = urllib.parse.urlsplit(base_url)
        host = parts.hostname if parts.port is None else f"{parts.hostname}:{parts.port}"
    except ValueError:  # a port that is none
        host = None
    known = host and parts.hostname and parts.scheme in ("http", "https")
    if not known or not re.fullmatch("[!-~]+", base_url):
        raise UserError("OPENAI_BASE_URL: is no http:// or https:// address of a server")
    if "@" in parts.netloc or parts.query or parts.fragment:
        more = "a user, a password or what follows ? or #"
        raise UserError(f"OPENAI_BASE_URL: holds {more}; give the key as OPENAI_API_KEY")
    return f"{base_url.rstrip('/')}/chat/completions", host


def ask(
    judge: str, messages: list, base_url: str, key: str | None, sleep: Callable = time.sleep
) -> str:
    """One chat completion -> text.

    Rate limits, server errors, timeouts and broken replies are tried again, after the time the
    server names (Retry-After) or a doubling one. Raises UserError where that does not help or the
    request itself is refused.
    """
    url, host = judge_url(base_url, key)
    where = f"--judge {judge} at {host}"
    body = json.dumps({"model": judge, "messages": messages, "temperature": 0}).encode()
    headers = {"Content-Type": "application/json"}
    headers |= {"Authorization": f"Bearer {key}"} if key else {}
    for attempt in range(ATTEMPTS):
        wait = FIRST_WAIT * 2**attempt
        try:
            request = urllib.request.Request(url, body, headers)
            with OPENER.open(request, timeout=TIMEOUT) as reply:
                value = json.loads(reply.read().decode("utf-8"))
            text = value["choices"][0]["message"]["content"]
            if isinstance(text, str) and text.strip():
                return text
            problem = "an empty answer"
        except urllib.error.HTTPError as error:
            if 300 <= error.code < 400:
                raise UserError(f"{where}: {redirected(url, error)}") from None
            message = error.read(300).decode("utf-8", "replace")
            problem = f"HTTP {error.code}: {' '.join(message.split())}"
            if error.code < 500 and error.code not in (408, 409, 425, 429):
                raise UserError(f"{where}: {problem}") from None
            wait = retry_after(error.headers.get("Retry-After"), wait)
        except BROKEN as error:
            problem = f"{type(error).__name__}: {error}"
        if attempt + 1 < ATTEMPTS:
            sleep(min(wait, LONGEST_WAIT))
    tried = f"no answer in {ATTEMPTS} tries, the last: {problem}"
    raise UserError(f"{where}: {tried}; the same command goes on from here")


def retry_after(value: str | None, default: float) -> float:
    """Seconds that a Retry-After header asks for, a number or a date; default where it is missing
    or odd."""
    try:
        if value.strip().replace(".", "", 1).isdigit():
            return float(value)
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (AttributeError, TypeError, ValueError):
        return default


def judge_access() -> tuple[str, str | None]:
    """-> base URL and key, from the environment."""
    base_url = os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
    return base_url, os.environ.get("OPENAI_API_KEY")


# ---- Judging -------------------------------------------------------------------------------------
def check(args: Namespace) -> None:
    """Refuse a judge that cannot be asked, before anything is written. Raises UserError."""
    read_prompts(args.judge_prompts)
    if not (os.environ.get("OPENAI_API_KEY") or os.environ.get("OPENAI_BASE_URL")):
        raise UserError("--judge: set OPENAI_API_KEY, or OPENAI_BASE_URL of a keyless server")
    judge_url(*judge_access())


def grade(judge: str, line: dict, messages: list[dict]) -> dict:
    """-> line with a judgement. One without a score is asked for once more, then counted as
    unscored (None)."""
    for _ in range(2):
        text = ask(judge, messages, *judge_access())
        score = parse_score(text)
        if score is not None:
            break
    return {**line, "score": score, "judge": judge, "judgement": text}


def judge_answers(label: str, questions: list[dict], rows: list[dict], args: Namespace) -> list:
    """Grade the answers (rows) of the model `label` in every round -> their judgements. They are
    appended to judgements/<judge>/<label>.jsonl as they come; none is asked for twice."""
    folder, saved = args.output_dir / "judgements" / safe_name(args.judge), set()
    store = Predictions(folder / f"{label}.jsonl", "judge")
    prompts, wording = read_prompts(args.judge_prompts)
    by_id, jobs = {question["question_id"]: question for question in questions}, {}
    turns = [(row, turn) for row in rows for turn in range(min(2, len(row["answers"])))]
    for row, turn in turns:
        name = row["question_id"]
        messages = judge_messages(prompts, by_id[name], row["answers"], turn)
        for i in range(args.rounds or 5):
            key = digest([args.judge, name, messages, i])
            line = {"key": key, "question_id": name, "category": row["category"], "turn": turn}
            jobs[key] = {**line, "round": i, "prompts": wording}, messages
    pool = concurrent.futures.ThreadPoolExecutor(JUDGE_THREADS)
    left = [key for key in jobs if line_key(key) not in store.known]
    futures = [pool.submit(grade, args.judge, *jobs[key]) for key in left]
    bar = {"total": len(futures), "desc": f"judge {label}", "leave": False}
    try:
        for future in tqdm(concurrent.futures.as_completed(futures), **bar):
            store.add([future.result()])
            saved.add(future)
    finally:  # after a failure: requests on their way are waited for and kept, no other starts
        pool.shutdown(cancel_futures=True)
        rest = [future for future in futures if future not in saved and not future.cancelled()]
        store.add([future.result() for future in rest if not future.exception()])
    return [line for line in store.rows if line["key"] in jobs]
