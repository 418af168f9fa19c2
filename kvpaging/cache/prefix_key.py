"""Page identity: a SHA-256 chain over full pages.

    key(page i) = H(key(page i - 1), namespace, tokens of page i)

The chain's root is the numerics identity (weights, architecture, KV dtype and layout, the path that
computes), so pages of two paths that differ in bits never meet. Equal keys mean equal K and V, and
still the tokens are compared as well: a key is never trusted alone.

The namespace is chosen page by page: a beginning that may be shared can be followed by a private
rest. Knows nothing of pages, pools or levels: the same key names a page everywhere.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import msgspec

from kvpaging.base.ids import PageKey

_DOMAIN = b"kvpaging page key 1\0"


def root_key(numerics_identity: bytes) -> PageKey:
    """The parent of every first page, for one way to compute."""
    return PageKey(hashlib.sha256(_DOMAIN + numerics_identity).digest())


def page_key(parent: PageKey, namespace: bytes, tokens: bytes) -> PageKey:
    """The key of a full page.

    Args:
        parent: the key of the page before it, or the root.
        namespace: whose page it is; any bytes are harmless, its length is hashed too.
        tokens: the page's token ids, packed as by `PrefixChain`.
    """
    return PageKey(
        hashlib.sha256(
            b"".join((parent, len(namespace).to_bytes(4, "little"), namespace, tokens))
        ).digest()
    )


class SharedPrefix(msgspec.Struct, frozen=True, gc=False):
    """The beginning of a sequence whose pages others may find too."""

    namespace: bytes
    num_tokens: int
    """Pages that lie within the first so many tokens are of `namespace`, the others are not."""


class ChainLink(NamedTuple):
    """One full page of a sequence: its identity, and what to compare beside it."""

    key: PageKey
    tokens: bytes
    """Little-endian uint32 token ids."""


class PrefixChain:
    """The links of one sequence's full pages, made as its tokens become known."""

    __slots__ = ("_namespace", "_packer", "_root", "_shared", "links", "page_size")

    def __init__(
        self,
        root: PageKey,
        namespace: bytes,
        page_size: int,
        shared: SharedPrefix | None = None,
    ):
        self._root = root
        self._namespace = namespace
        self._shared = shared
        self._packer = struct.Struct(f"<{page_size}I")
        self.page_size = page_size
        self.links: list[ChainLink] = []

    @classmethod
    def of_links(cls, root: PageKey, links: list[ChainLink], page_size: int) -> PrefixChain:
        """A chain of links that were made elsewhere, as a trace's are."""
        chain = cls(root, b"", page_size)
        chain.links = links
        return chain

    def num_missing(self, num_tokens: int) -> int:
        """Pages that the sequence's first `num_tokens` tokens fill and that have no link yet."""
        return max(0, num_tokens // self.page_size - len(self.links))

    def extend(self, token_ids: Sequence[int], max_pages: int | None = None) -> None:
        """Add the links of all pages that `token_ids` (the whole sequence) fills.

        With `max_pages` only of so many more.
        """
        size, num_pages = self.page_size, self.num_missing(len(token_ids))
        if max_pages is not None:
            num_pages = min(num_pages, max_pages)
        begin = len(self.links) * size
        for first in range(begin, begin + num_pages * size, size):
            tokens = self._packer.pack(*token_ids[first : first + size])
            namespace = self._namespace_of(first + size)
            self.links.append(ChainLink(page_key(self.parent_of_next, namespace, tokens), tokens))

    def _namespace_of(self, end: int) -> bytes:
        """Whose page it is that ends before token `end`."""
        if self._shared is not None and end <= self._shared.num_tokens:
            return self._shared.namespace
        return self._namespace

    @property
    def parent_of_next(self) -> PageKey:
        """The parent key of the page that is not full yet."""
        return self.links[-1].key if self.links else self._root

    def parent_of(self, index: int) -> PageKey:
        """The key before link `index`."""
        return self.links[index - 1].key if index else self._root

    def keys_under(self, root: PageKey) -> Iterator[PageKey]:
        """What the pages would be called under another root, one after the other, as it is asked.

        The namespaces are this chain's own: it finds nothing of others.
        """
        key = root
        for i, link in enumerate(self.links):
            key = page_key(key, self._namespace_of((i + 1) * self.page_size), link.tokens)
            yield key

    def fork(self, num_tokens: int) -> PrefixChain:
        """A chain over the same first `num_tokens` tokens that grows on its own."""
        twin = PrefixChain(self._root, self._namespace, self.page_size, self._shared)
        twin.links = self.links[: num_tokens // self.page_size]
        return twin

    def keys(self) -> Iterable[PageKey]:
        """All keys, first page first."""
        return (link.key for link in self.links)
