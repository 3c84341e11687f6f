"""RabbitMQ, with a node, an Erlang port mapper and data of its own."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from crossdock.spi import redact
from crossdock_conformance.servers.errors import NotControllable, ServerFailed
from crossdock_conformance.servers.recipe import HOST, Binary, Image, Launch, Reach, Recipe
from crossdock_conformance.servers.wire import connect, http_json, text

_ANSWERER = """
{ok, Address} = inet:parse_address(os:getenv("CROSSDOCK_ANSWERER_HOST")),
Port = list_to_integer(os:getenv("CROSSDOCK_ANSWERER_PORT")),
{ok, Listener} = gen_tcp:listen(Port, [binary, {ip, Address}, {active, false}, {reuseaddr, true}]),
Held = fun() ->
    [["queue ", V, " ", N] || Q <- rabbit_amqqueue:list(), {resource, V, queue, N} <- [amqqueue:get_name(Q)]]
    ++ [["exchange ", V, " ", N] || V <- rabbit_vhost:list_names(), X <- rabbit_exchange:list(V),
        {resource, _, exchange, N} <- [element(2, X)], N =/= <<>>, binary:match(N, <<"amq.">>) =/= {0, 4}]
    ++ [["connection ", N] || [{name, N}] <- rabbit_networking:connection_info_all([name])]
end,
Serve = fun Serve() ->
    {ok, Socket} = gen_tcp:accept(Listener),
    Answer = try rabbit:is_running() andalso Held() of
        false -> "starting\\n";
        Names -> ["running\\n", [[N, "\\n"] || N <- Names], "end\\n"]
    catch Class:Reason -> io_lib:format("failed ~0p ~0p\\n", [Class, Reason]) end,
    gen_tcp:send(Socket, Answer),
    gen_tcp:close(Socket),
    Serve()
end,
gen_tcp:controlling_process(Listener, spawn(Serve)).
"""
"""Runs inside the node: tells each who connects whether the broker is up, and the names of what it holds. The command-line tools
of RabbitMQ tell the same in a second or two, each time starting an Erlang machine; after every test that is too long."""

_ERLANG = "usr/lib/erlang/lib"
"""Where distributions have Erlang's own applications, below the root."""
_EVALUATE = (
    '{ok,T,_}=erl_scan:string(os:getenv("CROSSDOCK_ANSWERER")),{ok,E}=erl_parse:parse_exprs(T),{value,_,_}=erl_eval:exprs(E,[]).'
)
"""For -eval; without a space, because the server's start script splits its arguments at them."""

_ANSWERER_SCHEME = "answerer://"
"""Marks where the answerer listens, in `Reach.admin`; with a server that was given, that is the URL of the management plugin."""

_INSTALLED = "lib/rabbitmq/lib/rabbitmq_server-*/sbin/rabbitmq-server"
_CONFIGURATION = "disk_free_limit.absolute = 50MB\n"
_ADVANCED = "[{rabbit, [{dead_letter_worker_publisher_confirm_timeout, 5000}]}].\n"
"""A node that starts expires messages before it knows its bindings, on RabbitMQ 3; it looks again after so many milliseconds, which are
180,000 by default: too long for a test."""


class RabbitMQ(Recipe):
    """RabbitMQ: started by the script in its own `sbin`, because the one on Debian's PATH changes to another user and its paths."""

    kind = "rabbitmq"
    title = "RabbitMQ"
    program = "rabbitmq-server"
    places = (f"usr/{_INSTALLED}", f"usr/local/{_INSTALLED}", "opt/rabbitmq*/sbin/rabbitmq-server")
    package = "rabbitmq-server"
    ports = ("client", "admin", "distribution", "port mapper")
    plugins: Sequence[str] = ()
    """Those that a node of ours has."""
    start_within = 90.0
    stop_within = 30.0

    def version(self, binary: Binary) -> str | None:
        """By its folder: the program itself tells it only after starting an Erlang machine."""
        path = binary.path if binary.root else str(Path(binary.path).resolve())
        found = re.search(r"rabbitmq(?:_server)?[-/](\d+\.\d+[\d.]*)/", path)
        return found[1] if found else None

    def launch(self, binary: Binary, ports: Mapping[str, int], data: Path) -> Launch:
        if binary.root is not None and not (hosts := binary.root / "etc" / "hosts").exists():
            hosts.write_text("127.0.0.1 localhost\n")  # the port mapper looks its own name up
        home = data / "home"
        home.mkdir(exist_ok=True)
        (data / "enabled_plugins").write_text(f"[{','.join(self.plugins)}].\n")
        (data / "rabbitmq.conf").write_text(_CONFIGURATION)
        (data / "advanced.config").write_text(_ADVANCED)
        inside = binary.inside(data)
        path = Path(binary.path) if binary.root else Path(binary.path).resolve()
        root = binary.root or Path("/")
        _link_needed(["rabbit", *self.plugins], path.parents[1] / "plugins", root, data / "plugins")
        _link_modules([data / "plugins", root / _ERLANG], root, data / "modules")
        return Launch(
            Binary(str(path), binary.origin, binary.root).command(),
            {
                "HOME": f"{inside}/home",  # where the secret that nodes share is made
                "LANG": "C.UTF-8",
                # Has the start script become the Erlang machine instead of waiting for it, so that our signals reach it directly.
                "RUNNING_UNDER_SYSTEMD": "true",
                **({"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"} if binary.root else {}),
                "RABBITMQ_NODENAME": f"crossdock{ports['client']}@localhost",
                "RABBITMQ_NODE_IP_ADDRESS": HOST,
                "RABBITMQ_NODE_PORT": str(ports["client"]),
                "RABBITMQ_DIST_PORT": str(ports["distribution"]),
                "RABBITMQ_MNESIA_BASE": f"{inside}/mnesia",
                "RABBITMQ_LOG_BASE": f"{inside}/log",
                "RABBITMQ_LOGS": "-",
                "RABBITMQ_PLUGINS_DIR": f"{inside}/plugins",
                "RABBITMQ_ENABLED_PLUGINS_FILE": f"{inside}/enabled_plugins",
                "RABBITMQ_CONFIG_FILE": f"{inside}/rabbitmq.conf",
                "RABBITMQ_ADVANCED_CONFIG_FILE": f"{inside}/advanced.config",
                "RABBITMQ_CONF_ENV_FILE": f"{inside}/rabbitmq-env.conf",
                "ERL_EPMD_PORT": str(ports["port mapper"]),
                "ERL_EPMD_ADDRESS": HOST,
                "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": f"-pa {inside}/modules -kernel inet_dist_use_interface {{127,0,0,1}} "
                f"-eval {_EVALUATE}",
                "CROSSDOCK_ANSWERER": _ANSWERER,
                "CROSSDOCK_ANSWERER_HOST": HOST,
                "CROSSDOCK_ANSWERER_PORT": str(ports["admin"]),
            },
        )

    def image(self) -> Image:
        answerer = {
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": f"-eval {_EVALUATE}",
            "CROSSDOCK_ANSWERER": _ANSWERER,
            "CROSSDOCK_ANSWERER_HOST": "0.0.0.0",
            "CROSSDOCK_ANSWERER_PORT": "5670",
        }
        return Image("rabbitmq", client_port=5672, admin_port=5670, env=answerer)

    def reach(self, host: str, client_port: int, admin_port: int | None) -> Reach:
        return Reach(f"amqp://guest:guest@{host}:{client_port}/", f"{_ANSWERER_SCHEME}{host}:{admin_port}")

    def greet(self, reach: Reach, timeout: float) -> str:
        if reach.admin and reach.admin.startswith(_ANSWERER_SCHEME):
            _ask(reach.admin, timeout)
        with connect(reach.url, 5671 if reach.url.startswith("amqps") else 5672, timeout) as connection:
            connection.sendall(b"AMQP\x00\x00\x09\x01")
            start = _frame(connection)
        # The properties that the server introduces itself with are a table of a length byte, the name, S, four length bytes, the text.
        found = re.search(rb"\x07versionS(.{4})", start, re.DOTALL)
        if not found or b"RabbitMQ" not in start:
            raise ServerFailed(f"the server at {redact(reach.url)} is not RabbitMQ")
        return text(start[found.end() : found.end() + int.from_bytes(found[1], "big")])

    def residue(self, reach: Reach, timeout: float) -> set[str]:
        if reach.admin is None:
            raise NotControllable(
                f"what the server at {redact(reach.url)} holds is told by its management plugin: "
                "set CROSSDOCK_TEST_RABBITMQ_ADMIN_URL, such as http://USER:PASSWORD@HOST:15672"
            )
        ask = _ask if reach.admin.startswith(_ANSWERER_SCHEME) else _ask_management
        return ask(reach.admin, timeout)


def _link_needed(wanted: Iterable[str], applications: Path, root: Path, links: Path) -> None:
    """Link the applications that are needed, so that Erlang does not look through all the others for each of its modules: a node starts
    in two thirds of the time.

    Args:
        wanted: Names of applications; those that they need are found.
        applications: The folder of them all, as the broker sees it.
        root: Its root.
        links: The folder to make the links in.
    """
    folders = {folder.name.partition("-")[0]: folder for folder in (root / applications.relative_to("/")).iterdir()}
    links.mkdir(exist_ok=True)
    ahead = list(wanted)
    while ahead:
        name = ahead.pop()
        folder = folders.pop(name, None)
        if folder is None:  # of Erlang itself, or linked already
            continue
        link = links / folder.name
        if not link.is_symlink():
            link.symlink_to(applications / folder.name)
        needs = re.search(r"\{applications,\s*\[(.*?)\]", (folder / "ebin" / f"{name}.app").read_text(), re.DOTALL)
        ahead += re.findall(r"\w+", needs[1]) if needs else []


def _link_modules(libraries: Iterable[Path], root: Path, links: Path) -> None:
    """Link the modules of these libraries in one folder, for Erlang to look into first: it tries every application's folder for each of
    a thousand modules, which is a third of what a start costs.

    Args:
        libraries: Folders of applications.
        root: What the broker sees as its root.
        links: The folder to make the links in.
    """
    if links.exists():
        return
    links.mkdir()
    for module in (module for library in libraries for module in library.glob("*/ebin/*.beam")):
        link = links / module.name
        if not link.is_symlink():
            link.symlink_to("/" / module.relative_to(root))


def _ask(admin: str, timeout: float) -> set[str]:
    """The names that the answerer tells."""
    with connect(admin, 0, timeout) as connection, connection.makefile("rb") as file:
        first, *names = [text(line) for line in file.read().splitlines()] or [""]
    if first != "running" or not names or names.pop() != "end":
        raise ConnectionError(f"it is not ready: {first}")
    return set(names)


def _ask_management(admin: str, timeout: float) -> set[str]:
    """The names that the management plugin tells."""
    found: set[str] = set()
    for kind in ("queue", "exchange"):
        for item in http_json(admin, f"/api/{kind}s?disable_stats=true", timeout):
            if kind == "queue" or (item["name"] and not item["name"].startswith("amq.")):
                found.add(f"{kind} {item['vhost']} {item['name']}")
    return found | {f"connection {item['name']}" for item in http_json(admin, "/api/connections?disable_stats=true", timeout)}


def _frame(connection: socket.socket) -> bytes:
    """The payload of the first frame: a type byte, two of the channel, four of the length, the payload, an end byte."""
    with connection.makefile("rb") as file:
        head = file.read(7)
        if len(head) < 7 or head[:1] != b"\x01":
            raise ConnectionError("it does not greet as AMQP 0-9-1 does")
        return file.read(int.from_bytes(head[3:], "big"))
