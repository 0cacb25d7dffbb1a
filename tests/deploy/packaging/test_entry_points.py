"""What images and units start exists, takes the options that they give it, and works as a plain process."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
import zipfile
from pathlib import Path

import click
import pytest
import typer.main

from deploy.docker import forward, handover, health
from tests.deploy.packaging.commands import DEPLOY, ROOT, dockerfiles, started


def command_lines() -> dict[str, list[str]]:
    return dict(started())


@pytest.mark.parametrize("where", sorted(command_lines()))
def test_each_command_is_one_that_its_program_knows(where: str) -> None:
    words = [re.sub(r"\$\{\w+\}", "north", word) for word in command_lines()[where]]
    for separator in [number for number, word in enumerate(words) if word == "--"]:
        before, words = words[:separator], words[separator + 1 :]
        assert before[:3] == ["python", "-m", "deploy.docker.handover"]
        assert before[3:] == ["--relay-dir", "/var/lib/fedrad-relay"]
    if words[:2] == ["python", "-m"]:
        module = words[2].rpartition(".")[2]
        assert (DEPLOY / "docker" / f"{module}.py").is_file()
        if module == "health":
            assert all(re.fullmatch(r"tcp:127\.0\.0\.1:\d+|unix:/run/\S+", word) for word in words[3:]), words
            assert words[3:]
        return
    program, name, *options = words
    known = typer.main.get_command(application(program))
    assert isinstance(known, click.Group)
    command = known.get_command(click.Context(known), name)
    assert command is not None, f"{program} {name}"
    command.make_context(name, list(options), resilient_parsing=False)  # raises UsageError on a wrong option


def application(program: str) -> typer.Typer:
    if program == "fedrad-server":
        from deploy.server.cli import app
    else:
        assert program == "fedrad-site"
        from deploy.site.cli import app
    return app


def test_the_programs_are_installed_by_these_names() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert {"fedrad-server", "fedrad-site"} <= set(scripts)


@pytest.mark.parametrize("program", ["deploy.server.cli", "deploy.site.cli"])
def test_each_program_runs_as_a_plain_process(program: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", program, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0
    assert "Commands" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("dockerfile", dockerfiles(), ids=lambda path: path.name)
def test_the_tree_that_an_image_is_built_from_makes_a_wheel_without_the_other_role(
    dockerfile: Path, tmp_path: Path
) -> None:
    """The COPY and sed lines of the build stage, done by hand, and the wheel's own imports."""
    text = dockerfile.read_text().split("\nFROM ")[1]
    for sources, target in re.findall(r"^COPY (?!--from)(.+) (\S+)$", text, re.M):
        for source in sources.split():
            (tmp_path / target).parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / source).is_dir():
                shutil.copytree(
                    ROOT / source, tmp_path / target, ignore=shutil.ignore_patterns("__pycache__")
                )
            else:
                shutil.copy(ROOT / source, tmp_path / (source if target == "./" else target))
    (script,) = re.findall(r"sed -i '([^']+)' pyproject\.toml", text)
    subprocess.run(["sed", "-i", script, "pyproject.toml"], cwd=tmp_path, check=True)
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", "out"], cwd=tmp_path, check=True,
        capture_output=True,
    )  # fmt: skip
    (wheel,) = (tmp_path / "out").glob("*.whl")
    absent, module = (
        ("client", "deploy.server.up") if "server" in dockerfile.name else ("server", "deploy.site.up")
    )
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
        archive.extractall(tmp_path / "site")
    assert absent not in tops
    assert {"common", "deploy"} < tops
    # imported from the wheel alone, the other role's package forbidden
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); sys.modules[{absent!r}] = None\n"
        f"import {module}, {module.rpartition('.')[0]}.cli as cli\n"
        "import deploy.docker.health, deploy.docker.handover, deploy.docker.forward\n"
        f"assert cli.__file__.startswith({str(tmp_path / 'site')!r}), cli.__file__"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


# --- health -----------------------------------------------------------------------------------------------


def test_health_tells_what_listens_and_what_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "s"
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(path))
        unix.listen()
        port = tcp.getsockname()[1]
        assert health.main([f"tcp:127.0.0.1:{port}", f"unix:{path}"]) == 0
    assert health.main([f"tcp:127.0.0.1:{port}"]) == 1
    assert health.main([f"unix:{path}"]) == 1
    assert health.main([]) == 1
    assert health.main(["http://127.0.0.1/"]) == 1
    assert "expected tcp:HOST:PORT" in capsys.readouterr().out


# --- forward ----------------------------------------------------------------------------------------------


def test_the_gate_carries_bytes_both_ways_and_only_to_its_one_address() -> None:
    async def run() -> tuple[bytes, int]:
        async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            data = await reader.read()
            writer.write(data[::-1])
            await writer.drain()
            writer.close()

        far = await asyncio.start_server(echo, "127.0.0.1", 0)
        with socket.create_server(("127.0.0.1", 0)) as probe:
            near_port = probe.getsockname()[1]
        stop, ready = asyncio.Event(), asyncio.Event()
        to = ("127.0.0.1", far.sockets[0].getsockname()[1])
        running = asyncio.create_task(forward.forward(("127.0.0.1", near_port), to, stop=stop, ready=ready))
        await ready.wait()
        reader, writer = await asyncio.open_connection("127.0.0.1", near_port)
        writer.write(b"x" * 300_000 + b"end")
        writer.write_eof()
        answer = await reader.read()
        writer.close()
        far.close()
        stop.set()
        return answer, await running

    answer, carried = asyncio.run(run())
    assert (answer[:3], len(answer), carried) == (b"dne", 300_003, 1)


@pytest.mark.parametrize("text", ["9410", "link:", ":9410", "link:x", "link:0"])
def test_a_wrong_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        forward.parse_address(text)


# --- handover ---------------------------------------------------------------------------------------------


@pytest.fixture()
def sources(tmp_path: Path) -> dict[str, Path]:
    folder = tmp_path / "home"
    folder.mkdir()
    for name in handover.NAMES:
        (folder / name).write_text(f"{name} one")
    return {name: folder / name for name in handover.NAMES}


def test_files_are_given_once_readable_by_the_group_and_again_when_they_change(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    relay = tmp_path / "relay"
    relay.mkdir()
    assert handover.give(sources, relay, group=os.getgid())
    assert not handover.give(sources, relay, group=os.getgid())
    assert {(relay / name).stat().st_mode & 0o777 for name in handover.NAMES} == {0o640}
    sources["gateway-ca.pem"].write_text("another")
    assert handover.give(sources, relay, group=os.getgid())
    assert (relay / "gateway-ca.pem").read_text() == "another"


def test_the_relay_starts_when_it_has_its_files_and_again_when_they_change(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    relay, starts = tmp_path / "relay", tmp_path / "starts"
    relay.mkdir()
    starts.touch()
    command = ["sh", "-c", f"echo x >> {starts}; exec sleep 60"]
    stop = threading.Event()
    thread = threading.Thread(target=handover.watch, args=(relay, command), kwargs={"stop": stop})
    thread.start()
    try:
        assert starts.read_text() == ""
        handover.give(sources, relay, group=os.getgid())
        wait_for(lambda: starts.read_text() == "x\n")
        sources["gateway-ca.pem"].write_text("of a link that started again")
        handover.give(sources, relay, group=os.getgid())
        wait_for(lambda: starts.read_text() == "x\nx\n")
    finally:
        stop.set()
        thread.join(timeout=90)
    assert not thread.is_alive()


def test_the_exit_code_of_the_relay_is_told(sources: dict[str, Path], tmp_path: Path) -> None:
    relay = tmp_path / "relay"
    relay.mkdir()
    handover.give(sources, relay, group=os.getgid())
    assert handover.watch(relay, ["sh", "-c", "exit 7"], stop=threading.Event()) == 7


def test_the_module_ends_on_sigterm(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "deploy.docker.handover", "--relay-dir", str(tmp_path), "--", "sleep", "60"],
        cwd=ROOT,
    )
    time.sleep(1.0)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) in (0, -signal.SIGTERM)


def wait_for(condition: object, seconds: float = 90.0) -> None:
    assert callable(condition)
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)
