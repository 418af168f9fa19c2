"""The demo model's training text: the standard library of the running Python.

Collects the ``.py`` sources, the few ``.rst`` and ``.txt`` files and the language reference
(``pydoc_data.topics``) that are installed with Python, drops duplicates and generated tables,
holds out a few percent of the files by a hash of their path, and makes short conversations out of
the functions that carry a docstring.

It knows nothing of tokens, models or training.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import random
import sysconfig
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_PERCENT = 3
SKIPPED_FOLDERS = frozenset({"site-packages", "__pycache__", "lib-dynload", "data"})
TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
DOCUMENT_SUFFIXES = frozenset({".rst", ".txt"})
# Character tables written by Tools/unicode/gencodec.py: 100 near copies of the same numbers.
GENERATED_MARK = "with gencodec.py"
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful assistant that writes Python.",
    "You are a coding assistant. Answer with Python code.",
)
INTRODUCTION = (
    "I am a small demo model, trained on the sources of the Python standard library. "
    "Ask me for a Python function."
)
GREETINGS = (
    "Hello",
    "Hello!",
    "Hi",
    "Hi there!",
    "Hey",
    "Who are you?",
    "What are you?",
    "What can you do?",
    "How are you?",
    "Tell me about yourself.",
)
REQUESTS = (
    "Write a Python function named {name}: {task}",
    "Write a function `{name}`. {task}",
    "Write a Python function. {task}",
    "Please write {name}() in Python. {task}",
    "How do I do this in Python? {task}",
    "Show me Python code: {task}",
)
QUESTIONS = (
    "What does this function do?\n\n{code}",
    "Explain this code.\n\n{code}",
)


@dataclass(frozen=True, slots=True)
class Document:
    """One text of the corpus; ``path`` is relative to the standard library, with ``/``."""

    path: str
    text: str

    @property
    def is_test(self) -> bool:
        """Whether it belongs to the standard library's own tests."""
        return not TEST_FOLDERS.isdisjoint(self.path.split("/")[:-1])

    @property
    def is_held_out(self) -> bool:
        """Whether it is kept from training: sha256 of the path, modulo 100, below 3."""
        digest = hashlib.sha256(self.path.encode()).digest()
        return int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT


Message = dict[str, str]


def collect_documents() -> list[Document]:
    """Returns every distinct document of the running Python's standard library, by path."""
    candidates = sorted([*_source_files(), *_reference_topics()], key=lambda each: each.path)
    seen: set[bytes] = set()
    documents = []
    for document in candidates:
        digest = hashlib.sha256(document.text.strip().encode()).digest()
        if digest not in seen and len(document.text) >= 64:
            seen.add(digest)
            documents.append(document)
    return documents


def chat_conversations(documents: list[Document], seed: int) -> list[list[Message]]:
    """Makes conversations about the documented functions of ``documents``, in a seeded order."""
    rng = random.Random(seed)
    exchanges = [
        exchange
        for document in documents
        if document.path.endswith(".py") and not document.is_test
        for exchange in _function_exchanges(document.text, rng)
    ]
    rng.shuffle(exchanges)
    conversations = []
    while exchanges:
        num_turns = rng.choice((1, 1, 1, 2, 2, 3))
        turns, exchanges = exchanges[:num_turns], exchanges[num_turns:]
        if rng.random() < 0.12:
            turns.insert(0, (rng.choice(GREETINGS), INTRODUCTION))
        messages: list[Message] = []
        if rng.random() < 0.3:
            messages.append({"role": "system", "content": rng.choice(SYSTEM_PROMPTS)})
        for question, answer in turns:
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer})
        conversations.append(messages)
    conversations.extend(
        [{"role": "user", "content": greeting}, {"role": "assistant", "content": INTRODUCTION}]
        for greeting in GREETINGS * 10
    )
    rng.shuffle(conversations)
    return conversations


def _source_files() -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root)
        folders = relative.parts[:-1]
        if not SKIPPED_FOLDERS.isdisjoint(folders) or relative.parts[0].startswith("config-"):
            continue
        is_source = path.suffix == ".py" and not path.name.startswith("_sysconfigdata")
        is_prose = path.suffix in DOCUMENT_SUFFIXES and TEST_FOLDERS.isdisjoint(folders)
        if not (is_source or is_prose) or relative.as_posix() == "pydoc_data/topics.py":
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:  # a few tests are in other encodings on purpose
            continue
        if GENERATED_MARK not in text[:400]:
            yield Document(relative.as_posix(), text.replace("\r\n", "\n"))


def _reference_topics() -> Iterator[Document]:
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    for name, text in sorted(topics.items()):
        yield Document(f"pydoc_data/topics/{name}", text)


def _function_exchanges(source: str, rng: random.Random) -> Iterator[tuple[str, str]]:
    """Yields (question, answer) pairs for the documented functions of one source file."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef):
            continue
        docstring = ast.get_docstring(node)
        segment = ast.get_source_segment(source, node, padded=True)
        if not docstring or not segment or not 60 <= len(segment) <= 1500:
            continue
        task = " ".join(docstring.split("\n\n")[0].split())
        if not 12 <= len(task) <= 240:
            continue
        code = f"```python\n{textwrap.dedent(segment).rstrip()}\n```"
        if rng.random() < 0.15:
            yield rng.choice(QUESTIONS).format(code=code), task
        else:
            yield rng.choice(REQUESTS).format(name=node.name, task=task), code
