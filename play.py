"""Play sound: a file, or samples while they are made.

    play_file("out.wav")
    for piece in heard(pieces, channels=1, sampling_rate=32000):
        ...  # has been handed to the player

or `python play.py out.wav`. What plays is afplay (macOS has it), ffplay (of ffmpeg),
paplay or aplay, whichever is there first; samples that are still being made need ffplay
or aplay. Needs wav_stream.py, audio.py, resample.py and outputs.py beside it.
"""

import argparse
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from types import SimpleNamespace
from typing import BinaryIO

import mlx.core as mx

from wav_stream import WavStream

FFPLAY = ("ffplay", "-nodisp", "-autoexit", "-loglevel", "error")
FILE_PLAYERS = (("afplay",), FFPLAY, ("paplay",), ("aplay", "-q"))  # then the file
PIPE_PLAYERS = ((*FFPLAY, "-i", "-"), ("aplay", "-q", "-"))  # a wav to their input
ONLY_WAV = {"aplay"}
INSTALL = "Install ffmpeg, which brings ffplay: brew install ffmpeg, or apt install it."


def find_player(suffix: str = ".wav") -> tuple[str, ...]:
    """The command that plays files of a kind. Raises OSError where there is none."""
    for command in FILE_PLAYERS:
        able = suffix.lower() == ".wav" or command[0] not in ONLY_WAV
        if able and shutil.which(command[0]):
            return command
    kind = f"a {suffix}" if suffix else "this sound"
    raise OSError(f"There is nothing that plays {kind} here. {INSTALL}")


def find_pipe_player() -> tuple[str, ...]:
    """The command that plays a wav while it comes. Raises OSError where there is none."""
    for command in PIPE_PLAYERS:
        if shutil.which(command[0]):
            return command
    raise OSError(f"There is nothing that plays a sound while it is made. {INSTALL}")


def play_file(path: str | Path) -> None:
    """Play a sound file to its end. Raises OSError where that fails."""
    if not os.path.isfile(os.path.expanduser(path)):
        raise FileNotFoundError(f"There is no sound file {path}.")
    path = Path(path).expanduser().absolute()  # so that no name is taken for an option
    command = find_player(path.suffix)
    ended = subprocess.run([*command, str(path)], stdin=subprocess.DEVNULL)
    if ended.returncode:
        raise OSError(f"{command[0]} does not play {path}: status {ended.returncode}.")


def heard(
    pieces: Iterable[mx.array], channels: int, sampling_rate: int
) -> Iterator[mx.array]:
    """The same pieces (N, C), played as they come; ends when all was heard.

    A player that fails or is closed ends the sound, and not the pieces; a warning says
    so. Raises OSError where there is none.
    """
    command = find_pipe_player()
    # A session of its own: Ctrl-C ends the take, and what was made is still heard.
    own = dict(stdin=subprocess.PIPE, start_new_session=True)
    player = subprocess.Popen(command, **own)
    waiting: SimpleQueue[bytes] = SimpleQueue()  # so that a take need not wait
    writer = Thread(target=feed, args=(waiting, player.stdin), daemon=True)
    writer.start()
    file = SimpleNamespace(write=waiting.put, flush=lambda: None)
    try:
        wav = WavStream(file, channels, sampling_rate, rewinds=False)
        for piece in pieces:
            wav.write(piece)
            yield piece
    finally:
        waiting.put(b"")
        writer.join()
        if status := player.wait():
            warnings.warn(f"{command[0]} did not play all of it: status {status}.")


def feed(waiting: SimpleQueue[bytes], pipe: BinaryIO) -> None:
    """Write what waits until there are no bytes, whether it is read or not."""
    with suppress(OSError), pipe:
        while data := waiting.get():
            pipe.write(data)
            pipe.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description="Play sound files.")
    parser.add_argument("files", nargs="+", metavar="FILE", help="sound file to play")
    args = parser.parse_args()
    try:
        for path in args.files:
            play_file(path)
    except OSError as error:
        sys.exit(f"play.py: error: {' '.join(str(error).split()):.370}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
