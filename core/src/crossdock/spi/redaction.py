"""Taking secrets out of URLs before anybody sees them."""

from __future__ import annotations

from urllib.parse import parse_qsl, urlencode, urlsplit

HIDDEN = "***"
_PUBLIC_OPTIONS = frozenset({"durability"})


def redact(url: str, public_options: frozenset[str] = _PUBLIC_OPTIONS) -> str:
    """Return `url` fit for logs and errors: the password, a token in the user's place and unknown option values are hidden.

    Args:
        url: A broker URL; several hosts separated by commas are fine. Text that is no URL is hidden whole.
        public_options: Names of query options whose values may be shown.
    """
    try:
        parts = urlsplit(url)
    except ValueError:
        return HIDDEN
    if not parts.scheme:
        return HIDDEN
    hosts: list[str] = []
    for host in parts.netloc.split(","):
        secret, at, address = host.rpartition("@")
        if not at:
            hosts.append(address)
            continue
        user, colon, _ = secret.partition(":")
        hosts.append(f"{user}:{HIDDEN}@{address}" if colon else f"{HIDDEN}@{address}")
    query = urlencode(
        [(name, value if name in public_options else HIDDEN) for name, value in parse_qsl(parts.query, keep_blank_values=True)],
        safe="*",
    )
    # Not urlunsplit: it writes `sqlite:///a.db` as `sqlite:/a.db`.
    return f"{parts.scheme}://{','.join(hosts)}{parts.path}" + (f"?{query}" if query else "")
