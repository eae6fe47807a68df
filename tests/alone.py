"""Try scripts where only some of the others lie beside them; `test_house.py` starts it.

Reads [[name, folder], ...] from its input, and writes {name: what went wrong, or null}.
All run in this process, for MLX takes a while to start; of a script and what it imports
nothing stays. Asked of each is a tiny computation: `try_audio` tries audio.py.
"""

import contextlib
import importlib
import io
import json
import math
import os
import runpy
import sys
import traceback
from argparse import ArgumentParser, Namespace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import patch

import alone_diffusion
import alone_serve
import alone_train
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import soundfile

ROOT = Path(__file__).resolve().parent.parent
REFERENCE, TINY = ROOT / "reference", ROOT / "tiny"
NOISE = np.random.default_rng(0).normal(size=(32000, 1)).astype(np.float32) / 9


def run(script: str, *arguments: str) -> None:
    """As from a command line. Raises SystemExit where it fails."""
    with patch("sys.argv", [script, *map(str, arguments)]):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as stop:
            if stop.code:
                raise


def small_codec(encodec: ModuleType) -> nn.Module:
    small = dict(num_filters=4, hidden_size=8, codebook_size=16, num_lstm_layers=1)
    return encodec.Encodec(encodec.EncodecConfig(target_bandwidths=(0.4,), **small))


def try_adapters(adapters):
    paths = [REFERENCE / "peft" / "mono", REFERENCE / "peft" / "ours-mono.safetensors"]
    adapters.check_files(paths)
    model = SimpleNamespace()
    beside = adapters.work_in(model, adapters.weighted(paths[1:], 0.5))
    assert beside == [(paths[1], 0.5)] and model._adapter["adapter_scale"] == 0.5


def try_beat(beat):
    assert beat.make_beat(120).bars(4) == 8.0
    assert beat.Beat(90.0).named("rock") == "rock, 90 bpm"


def try_arguments(arguments):
    args = arguments.parse_arguments(["slow bell", "-m", "tiny", "-d", "2"])
    assert (args.prompt, args.model, args.duration) == (["slow bell"], "tiny", 2.0)


def try_audio(audio):
    audio.save_audio("a.wav", NOISE, 32000)
    assert audio.load_audio("a.wav", 16000, 2).shape == (16000, 2)
    run("audio.py", "a.wav", "b.flac", "--sampling-rate", "8000")


def try_audiocraft(audiocraft):
    path = REFERENCE / "mono-audiocraft" / "state_dict.bin"
    assert audiocraft.read_decoder(path).config["num_codebooks"] == 4


def try_benchmark(benchmark):
    from musicgen import MusicGen

    run("benchmark.py", "--help")
    assert benchmark.weight_bytes(MusicGen.from_pretrained(TINY).decoder) > 1e6


def try_checkpoints(checkpoints):
    assert checkpoints.read(str(TINY)).config.decoder.hidden_size == 192


def try_conditioning(conditioning):
    settings = dict(model_type="musicgen", decoder={})
    assert conditioning.read_config(settings) is None
    for kind, width in (("melody", 12), ("style", 512)):
        settings["conditioner"] = {"kind": kind}
        assert conditioning.read_config(settings).width == width


def try_convert(convert):
    source = REFERENCE / "mono-audiocraft"
    run("convert.py", "--hf-path", source, "--mlx-path", "out")
    run("convert.py", "--hf-path", TINY, "--mlx-path", "out-4bit", "--quantize")
    assert convert.is_converted(Path("out")) and convert.is_converted(Path("out-4bit"))


def try_decoder(decoder):
    model = decoder.Decoder(decoder.DecoderConfig(10, 16, 2, 2, 20), text_width=12)
    text = decoder.Condition(mx.ones((2, 5, 12)), mx.ones((2, 5), mx.bool_))
    cache, tokens = model.make_cache(2, 3), mx.zeros((2, 3, 4), mx.uint32)
    assert model(tokens, model.text_kv(text), cache).shape == (2, 3, 4, 10)


def try_decoder_names(decoder_names):
    weights = {f"lm_heads.{i}.weight": mx.zeros((2, 3)) for i in range(4)}
    assert decoder_names.name_decoder(weights)["linears.weight"].shape == (8, 3)


def try_demucs(demucs):
    import audio

    audio.save_audio("a.wav", NOISE[:4000], 4000)
    run("demucs.py", "a.wav", "--model", REFERENCE / "htdemucs", "--output-dir", "out")
    model = demucs.HTDemucs.from_pretrained(REFERENCE / "htdemucs")
    assert model.separate(mx.ones((400, 2))).shape == (4, 400, 2)


def try_edit(edit):
    flags = dict.fromkeys((*edit.OTHERS, "drop_prompt", "stream", "tensor_parallel"))
    flags |= dict.fromkeys(("duration", "ending", "text", "save_codes", "audio_prompt"))
    flags |= dict.fromkeys(("prompt_start", "prompt_length", "candidates"))
    args = Namespace(regenerate=["8:12", "a.wav"], prompt=[""], takes=1, **flags)
    edit.set_edit(args)
    assert args.regenerate == (((8.0, 12.0),), Path("a.wav"), 0.0, None)


def try_encodec(encodec):
    import audio

    codec = small_codec(encodec)
    chunks = codec.encode(mx.array(NOISE)[None])
    assert codec.decode(chunks).shape == (1, 32000, 1)
    audio.save_audio("a.wav", NOISE[:6400], 32000)
    run("encodec.py", "a.wav", "b.wav", "--model", REFERENCE / "encodec_32khz")


def try_encodec_files(encodec_files):
    for name in ("encodec_32khz", "mono-audiocraft"):
        _, settings, weights = encodec_files.read(REFERENCE / name)
        assert settings["sampling_rate"] == 32000 and weights


def try_encodec_stream(encodec_stream):
    import encodec

    stream = encodec_stream.DecodingStream(small_codec(encodec))
    codes = mx.zeros((1, 9, 2), mx.int32)
    pieces = [stream.push(codes[:, :4]), stream.push(codes[:, 4:], last=True)]
    assert mx.concatenate(pieces, axis=1).shape == (1, 9 * 640, 1)


def try_endings(endings):
    assert endings.fade(NOISE, 32000, fade_out=0.5)[-1, 0] == 0
    cut = endings.Ending(tail=0.5).apply(NOISE, 32000, first=16000)
    assert 16000 <= len(cut) <= 32000


def try_engine(engine):
    import decoder

    model = decoder.Decoder(decoder.DecoderConfig(10, 16, 2, 2, 20), text_width=12)
    text = decoder.Condition(mx.ones((2, 5, 12)), mx.ones((2, 5), mx.bool_))
    forward = engine.Engine(model, text, copies=2, steps=3)
    forward.rewind()
    assert forward(mx.zeros((1, 1, 4), mx.uint32)).shape == (2, 1, 4, 10)


def try_evaluate(evaluate):
    import synth

    run("evaluate.py", "--help")
    sound = synth.render(synth.KNOWN[0], np.random.default_rng(0), 4.0)
    assert evaluate.measure(sound) is not None


def try_evaluate_score(evaluate_score):
    sounds = NOISE[:16000, 0], NOISE[16000:, 0]
    assert evaluate_score.spectral_distance(*sounds) > 1
    assert evaluate_score.spectral_distance(sounds[0], sounds[0]) == 0


def try_evaluate_fill(evaluate_fill):
    run("evaluate_fill.py", "--help")
    sound = np.tile(NOISE[:, 0], 8)  # the same on both sides of any seam
    found = evaluate_fill.find(sound)
    assert found.jump > 1 and found.measures is not None


def try_fidelity(fidelity):
    case = ["--model", TINY, "--duration", "0.1", "--q-mode", "mxfp4"]
    run("fidelity.py", *case)


def tiny_magnet(magnet: ModuleType) -> nn.Module:
    """Tiny, taken for a MAGNeT."""
    files = magnet.read(str(TINY))
    files.config.masking = dict(span_len=3, subcodes_context=5)
    return magnet.MAGNeT.from_pretrained(TINY, files=files)


def try_fill(fill):
    import magnet

    model = tiny_magnet(magnet)
    codes = mx.zeros((1, 30, 4), mx.uint32)
    how = dict(parts=[(0.2, 0.4)], seed=0, decoding_steps=(1, 1, 1, 1))
    filled = fill.fill(model, codes, "bell", **how)
    assert filled.shape == (1, 30, 4) and (filled[:, 20:] == 0).all()


def try_generate(generate):
    flags = ["--model", TINY, "--duration", "0.1", "--takes", "2", "--seed", "7"]
    run("generate.py", "--prompt", "slow bell", *flags)
    assert Path("slow-bell-8.wav").is_file()


def try_group_norm(group_norm):
    assert group_norm.GroupNorm(2, 6)(mx.ones((1, 9, 6))).shape == (1, 9, 6)


def try_hub(hub):
    hub.check_name("stereo-small")
    assert hub.local("tiny") == Path.cwd() / "tiny" and hub.local("small") is None


def try_job(job):
    first, second = job.plan(["bell"], dict(seed=3, output="b.wav"), takes=2)
    first.check()
    assert (second.seed, str(second.output)) == (4, "b-2.wav")


def try_jobs(jobs):
    from job import plan
    from musicgen import MusicGen

    model, values = MusicGen.from_pretrained(TINY), dict(seed=0, output="a.wav")
    planned = plan(["bell", "saw"], values | {"duration": 0.1})
    for batch in jobs.run(model, planned, size=2):
        assert [take.total for take in batch] == [8] * 8
        assert [result.error for result in batch.save()] == [None, None]
    assert Path("a-2.wav").is_file()


def try_limits(limits):
    limits.check_numbers(SimpleNamespace(a=3, b=None), dict(a=(1, 3), b=(1, 2)), "b")
    try:
        limits.check_numbers(SimpleNamespace(a=4), dict(a=(1, 3)))
    except ValueError as error:
        assert str(error) == "a must be from 1 to 3, got 4."


def try_lines(lines):
    Path("a.txt").write_text("bell\nsaw\n")
    planned = lines.plan_file(Path("a.txt"), dict(seed=3, output="a.wav"))
    assert [job.seed for job in planned] == [3, 4]
    assert lines.left(planned, {}) == (planned, [])


def try_loops(loops):
    from beat import Beat

    assert loops.loop_samples(Beat(120), 4, 32000) == 256000
    wave = mx.sin(mx.arange(640)[:, None] * (2 * math.pi / 64))
    assert loops.resample_circle(wave, 700).shape == (700, 1)


def try_lora(lora):
    layer = nn.Linear(4, 6, bias=False)
    adapter = lora.LoRALinear(layer, rank=2, scale=1.0)
    assert mx.array_equal(adapter(mx.ones((1, 4))), layer(mx.ones((1, 4))))


def try_loudness(loudness):
    import audio

    louder = loudness.to_loudness(NOISE, 32000, -30)
    assert abs(loudness.integrated_loudness(louder, 32000) + 30) < 0.1
    audio.save_audio("a.wav", NOISE, 32000)
    run("loudness.py", "a.wav")


def try_melody(melody):
    assert melody.extract_chroma(NOISE, 32000).shape == (8, 12)
    soundfile.write("a.wav", NOISE, 32000)
    run("melody.py", "a.wav")


def try_messages(messages):
    assert messages.one_line("a\n\x1b[1m") == "a \\x1b[1m"
    messages.Forgiving(None).write("to nobody")


def try_mert(mert):
    soundfile.write("a.wav", NOISE, 32000)
    folder = REFERENCE / "style-audiocraft" / "MERT-v1-95M"
    run("mert.py", "a.wav", "--model", folder)


def try_magnet(magnet):
    model = tiny_magnet(magnet)
    options = dict(duration=0.3, seed=0, decoding_steps=(2, 1, 1, 1))
    assert model.generate(["bell", "saw"], **options).shape == (2, 9600, 1)


def try_magnet_job(magnet_job):
    assert magnet_job.is_magnet("magnet-small-10secs") and not magnet_job.is_magnet(
        "a/b"
    )
    given = magnet_job.asked_for(dict(temp=0, decoding_steps="2,1", output="a.wav"))
    options = magnet_job.fit(given, magnet=True)
    assert (options.temp, options.decoding_steps, options.top_p) == (0, (2, 1), 0.9)


def try_models(models):
    assert "audiogen-medium" in models.table()
    run("models.py")


def try_musicgen(musicgen):
    model = musicgen.MusicGen.from_pretrained(TINY)
    assert model.plain
    assert model.generate(["bell", "saw"], duration=0.1).shape == (2, 3200, 1)


def try_notes(notes):
    tune = notes.parse("C E G:2 | A - F#:3", notes.Beat(110))
    assert tune.chroma().shape == (39, 12)


def try_options(options):
    options.Options(duration=3, negative_prompt="drums").check()
    assert options.row_seeds(3, 2) == [3, 4]


def try_outputs(outputs):
    path = outputs.free(outputs.default_name("Slow bell!", 7))
    with outputs.whole_file(path) as part:
        part.write_bytes(b"sound")
    assert outputs.free(path) == Path("slow-bell-7-2.wav")


def try_parallel(parallel):
    (x,) = {mx.ones(3, stream=s).sum().item() for s in parallel.parallel_streams()}
    assert x == 3


def try_peft_config(peft_config):
    config = peft_config.read_config(REFERENCE / "peft/mono" / peft_config.CONFIG)
    assert config["r"] == 2
    module = "decoder.model.decoder.layers.0.fc1"
    assert peft_config.left_out_by(config, module) is None
    assert peft_config.left_out_by(config, module + "9") == "target_modules"


def try_peft_files(peft_files):
    adapter = peft_files.read(REFERENCE / "peft" / "mono")
    assert len(peft_files.changes(adapter, codebooks=4)) == 17
    run("peft_files.py", REFERENCE / "peft" / "ours-mono.safetensors", "out")
    assert peft_files.read("out").config["r"] == 3


def try_play(play):
    Path("a.wav").touch()
    with patch.dict(os.environ, PATH=""):
        try:
            play.play_file("a.wav")
        except OSError as error:
            assert "Install ffmpeg" in str(error)


def try_progress(progress):
    with progress.Progress(stream=io.StringIO()) as shows:
        shows.begin("take", 2.0)
        shows.to(1.0)


def try_ported(ported):
    try:
        ported.check_decoder({"transformer_lm.past_context": "5"})
    except ValueError as error:
        assert str(error) == "transformer_lm.past_context must be null, got 5"


def try_prompt(prompt):
    sizes = dict(decoder=Namespace(num_codebooks=4, vocab_size=8))
    sizes |= dict(audio_encoder=Namespace(hop_length=640))
    frames_in = lambda seconds: int(50 * seconds)  # noqa: E731
    model = Namespace(config=Namespace(**sizes), frame_rate=50, frames_in=frames_in)
    codes = mx.ones((1, 3, 4), mx.int32)
    assert prompt.start_with(model, None, codes, duration=1.0) is codes
    assert prompt.prompt_frames(model, mx.zeros((641, 1))) == 2


def try_published(published):
    for name in ("style-audiocraft", "melody-transformers"):
        found = published.read(REFERENCE / name)
        assert found.path.parent == REFERENCE / name and found.weights
        assert found.tokenizer.encode("a") and found.read_text_encoder()


def try_quantize(quantize):
    model = nn.Module()
    model.config = Namespace(hidden_size=32, ffn_dim=64)
    model.layers = [nn.Linear(32, 64, bias=False)]
    quantize.quantize(model, mode="mxfp4")
    assert model.layers[0].scales.dtype == mx.uint8


def try_ranking(ranking):
    model = ranking.MusicGen.from_pretrained(TINY)
    codes = model.generate_codes(["bell", "saw"], duration=0.2)
    assert ranking.log_likelihood(model, ["bell", "saw"], codes).shape == (2,)
    assert ranking.order([1.0, 2.0]) == [1, 0]


def try_recall(recall):
    parser = ArgumentParser()
    for name in ("again", "resume", "redecode", "regenerate", "model", "output"):
        parser.add_argument(f"--{name}")
    assert recall.recalled(parser, ["--output", "a.wav"]) == []


def try_regenerate(regenerate):
    model = regenerate.MusicGen.from_pretrained(TINY)
    codes = model.generate_codes("bell", duration=0.5)
    how = dict(part=(0.2, 0.3), candidates=2)
    made = regenerate.regenerate(model, codes, "bell", **how)
    assert made.codes.shape == (2, *codes.shape[1:])


def try_remake(remake):
    from edit import Edit
    from options import Options

    model, path = remake.MusicGen.from_pretrained(TINY), Path("bell.safetensors")
    codes = model.generate_codes("bell", duration=0.5)
    remake.jobs.settings.save_codes(path, codes, dict(model=str(TINY)))
    job = remake.Job("bell", 0, Path("a.wav"), Options())
    how = remake.How(Edit(((0.2, 0.3),), path), candidates=2, named=False)
    edit = remake.start(model, [job], remake.Sounds(model), how)
    assert len([*edit]) > 2 and edit.finish().startswith("2 candidates")
    assert [made.codes.shape for made in edit.results()] == [codes.shape]


def try_resample(resample):
    assert resample.resample(NOISE, 32000, 16000).shape == (16000, 1)
    assert resample.true_peak(NOISE) >= abs(NOISE).max()


def try_sources(sources):
    model, path = sources.MusicGen.from_pretrained(TINY), Path("codes.safetensors")
    codes = model.generate_codes("bell", duration=0.2)
    sources.settings.save_codes(path, codes, dict(model=str(TINY)))
    assert sources.read_start(path, model, 1.0).codes.shape == (1, 8, 4)


def try_sections(sections):
    song = sections.parse("0: calm | 12: loud", fade=1.0)
    assert (song.texts, sections.times(song)) == (
        ["calm", "loud"],
        (0.0, 12.0, 1.0, None),
    )


def try_settings(settings):
    settings.save_codes("a.safetensors", mx.ones((1, 3, 4), mx.uint16), {"seed": 3})
    assert settings.load_codes("a.safetensors")[1]["seed"] == 3
    run("settings.py", "a.safetensors")


def try_stream(stream):
    pieces = [mx.zeros((640, 1)), mx.ones((640, 1)) / 2]
    assert stream.write("a.wav", pieces, 1, 32000).seconds == 0.04


def try_style(style):
    import encodec

    sizes = dict(width=8, num_layers=1, num_heads=2, hidden=9, bins=4, ds_factor=3)
    seconds = dict(length=0.5, varying_lengths=(0.1, 1))
    config = style.StyleConfig(**sizes, **seconds, mert=None, encodec_n_q=2)
    conditioner = config.build(small_codec(encodec), 30.0)
    request = style.StyleRequest(mx.array(NOISE))
    assert conditioner.prepare(request, 0, 8.0).shape == (9, 8)


def try_synth(synth):
    run("synth.py", "--listen", "1", "--output-dir", "clips")
    assert len(list(Path("clips").glob("*.wav"))) == 1


def try_t5(t5):
    model = t5.T5(t5.T5Config(300, 12, 6, 24, 1, 2))
    ids = t5.Tokenizer(TINY / "spiece.model").encode("slow bell")
    assert model.encode([ids])[0].shape == (1, len(ids), 12)


def try_t5_files(t5_files):
    settings, weights, spiece = t5_files.read(REFERENCE / "t5-gated")
    assert settings["d_model"] and weights and spiece.is_file()


def try_together(together):
    peers = together.Peers(mx.distributed.init())
    with peers.watched("nobody is left"):
        assert mx.distributed.all_sum(mx.ones(1)).item() == 1


def try_strict(strict):
    told = strict.misfit(ValueError("Missing 2 parameters: \na,\nb."))
    assert told == "a is missing, and so are 1 more"


def try_textless(textless):
    prompts, options = textless.without_text("m", None, textless.Options())
    assert options.copies == 1


def try_torch_file(torch_file):
    path = REFERENCE / "mono-audiocraft" / "state_dict.bin"
    assert "best_state" in torch_file.load_torch(path)
    run("torch_file.py", path)


def try_train(train):
    run("train.py", "lora", "--help")


def try_wav_stream(wav_stream):
    with open("a.wav", "wb") as file:
        wav = wav_stream.WavStream(file, 1, 32000)
        wav.write(mx.array(NOISE))
    assert wav.seconds == 1 and soundfile.info("a.wav").frames == 32000


TRIALS = {
    name.removeprefix("try_"): trial
    for place in (globals(), *map(vars, (alone_diffusion, alone_serve, alone_train)))
    for name, trial in [*place.items()]
    if name.startswith("try_")
}


def what_is_wrong(name: str, folder: str) -> str | None:
    """The traceback where the script cannot be imported, or its trial fails."""
    scripts = {path.stem for path in ROOT.glob("*.py")}
    for module in scripts & sys.modules.keys():
        del sys.modules[module]
    os.chdir(folder)
    elsewhere = (str(ROOT), str(ROOT / "tests"), "")
    places = [folder, *(place for place in sys.path if place not in elsewhere)]
    out = io.TextIOWrapper(io.BytesIO())
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            with patch.object(sys, "path", places):
                TRIALS[name](importlib.import_module(name))
    except BaseException:
        return traceback.format_exc()
    modules = [sys.modules[module] for module in scripts & sys.modules.keys()]
    found = {str(Path(module.__file__).parent) for module in modules}
    return None if found == {folder} else f"it imports from {found}"


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    tried = {name: what_is_wrong(name, folder) for name, folder in json.load(sys.stdin)}
    print(json.dumps(tried))
