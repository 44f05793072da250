import pytest
import torch

from blockstream.errors import ConfigError
from movd.vae import OPENSORA_VAE_V1_2, OpenSoraVAE, OpenSoraVAEConfig
from movd.vae_temporal import ChunkNorm, channels_to_time
from tests.support import movd_tiny as tiny
from tests.support.while_running import only_while_running


@pytest.fixture(scope="module")
def vae():
    return tiny.vae()


def latents(vae, frames, batch=1):
    return tiny.noise(batch, 4, vae.config.latent_frames(frames), 2, 3, key=5)


@pytest.mark.parametrize("frames", [1, 5, 17, 20, 34])
def test_a_clip_comes_back_in_its_shape(vae, frames):
    x = tiny.noise(2, 3, frames, 16, 24, key=frames)
    z = vae.encode(x, sample=False)
    assert z.shape == (2, 4, vae.config.latent_frames(frames), 2, 3)
    assert vae.decode(z, frames).shape == x.shape


def test_chunks_are_decoded_one_by_one_without_seeing_one_another(vae):
    z = latents(vae, 40)
    chunks = list(vae.decode_chunks(z, 40))
    assert [chunk.shape[2] for chunk in chunks] == [17, 17, 6]
    assert torch.equal(torch.cat(chunks, 2), vae.decode(z, 40))
    changed = z.clone()
    changed[:, :, 5:] += 1
    assert torch.equal(next(vae.decode_chunks(changed, 40)), chunks[0])


def test_latents_of_another_length_are_refused_with_both_numbers(vae):
    with pytest.raises(ValueError, match="10 latent frames are not 51 frames, which have 15"):
        vae.decode(latents(vae, 34), 51)


def test_a_chunk_sees_no_later_frame_but_through_its_group_norms(vae, monkeypatch):
    monkeypatch.setattr(ChunkNorm, "forward", lambda self, x: x)
    z = latents(vae, 17)
    later = z.clone()
    later[:, :, 3:] += 1
    a, b = (vae.temporal_vae.decode(latent, 17) for latent in (z, later))
    same = [torch.equal(a[:, :, t], b[:, :, t]) for t in range(17)]
    assert same == [True] * 9 + [False] * 8  # 3 latent frames are 12, less the 3 in front


def test_channels_become_pairs_of_frames():
    x = torch.arange(8.0).view(1, 4, 2, 1, 1)  # channel 2c + s at two times
    got = channels_to_time(x)
    assert got.flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert got.shape == (1, 2, 4, 1, 1)


def test_the_draws_of_both_posteriors_come_from_the_generator(vae):
    x = tiny.noise(1, 3, 20, 16, 16, key=1)

    def draw(seed):
        return vae.encode(x, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert not torch.equal(draw(1), vae.encode(x, sample=False))


@pytest.mark.parametrize(
    ("height", "width", "frames"), [(64, 64, 4), (128, 256, 2), (256, 256, 1), (720, 1280, 1)]
)
def test_frames_a_call_follow_from_config_and_size(height, width, frames):
    assert OPENSORA_VAE_V1_2.frames_a_call(height, width) == frames


def test_the_2d_vae_never_takes_more_frames_than_its_micro_batch():
    vae, calls = tiny.vae(micro_batch_size=3), []
    vae.spatial_vae.module.decoder.conv_in.register_forward_hook(lambda m, a, y: calls.append(len(y)))
    vae.decode(latents(vae, 20), 20)
    assert calls == [3, 3, 3, 3, 3, 2, 3]


def test_blocks_read_their_weights_only_while_they_run(vae):
    z = latents(vae, 20)
    want, streamed = vae.decode(z, 20), tiny.vae()
    order = []
    for frames in streamed.config.chunks(20):
        streamed.plan_decode(frames, 16, 24)
        order += streamed.stream_order()
    with only_while_running(streamed, sorted(set(order))) as visits:
        got = streamed.decode(z, 20)
    assert torch.equal(got, want)
    assert visits == order


def test_most_weights_of_the_decoders_are_in_blocks():
    with torch.device("meta"):
        vae = OpenSoraVAE(OPENSORA_VAE_V1_2)
    order = set(vae.stream_order())
    decoders = (vae.temporal_vae.decoder, vae.spatial_vae.module.decoder)
    total = sum(p.numel() for net in decoders for p in net.parameters())
    held = sum(p.numel() for name in order for p in vae.get_submodule(name).parameters())
    assert held > 0.99 * total
    assert sum(name.startswith("spatial_vae") for name in vae.stream_order()) == 17 * 5


def test_encoding_reads_a_blocks_weights_only_while_it_runs(vae):
    x = tiny.noise(1, 3, 9, 16, 16, key=2)
    want, streamed = vae.encode(x, sample=False), tiny.vae()
    names = [f"spatial_vae.module.encoder.down_blocks.{i}" for i in range(4)]
    names += ["spatial_vae.module.encoder.mid_block", "temporal_vae.encoder.res_blocks.0"]
    names += [f"temporal_vae.encoder.block_res_blocks.{i}.0" for i in range(4)]
    with only_while_running(streamed, names) as visits:
        assert torch.equal(streamed.encode(x, sample=False), want)
    assert set(visits) == set(names)


def test_the_full_size_model_has_the_released_keys_and_parameters():
    with torch.device("meta"):
        vae = OpenSoraVAE(OPENSORA_VAE_V1_2)
    keys = vae.state_dict()
    assert sum(p.numel() for p in vae.parameters()) == 393_341_007
    assert len(keys) == 517
    for key, shape in {
        "scale": (1, 4, 1, 1, 1),
        "spatial_vae.module.decoder.mid_block.attentions.0.to_out.0.weight": (512, 512),
        "spatial_vae.module.encoder.down_blocks.2.resnets.0.conv_shortcut.weight": (512, 256, 1, 1),
        "temporal_vae.encoder.conv_blocks.2.conv.bias": (256,),
        "temporal_vae.decoder.block_res_blocks.2.0.conv3.conv.weight": (256, 512, 1, 1, 1),
        "temporal_vae.decoder.res_blocks.3.norm2.weight": (512,),
    }.items():
        assert tuple(keys[key].shape) == shape


def test_the_released_config_is_accepted_whole():
    config = OpenSoraVAEConfig(
        architectures=["VideoAutoencoderPipeline"],
        model_type="VideoAutoencoderPipeline",
        torch_dtype="float32",
        transformers_version="4.36.2",
        cal_loss=False,
        freeze_vae_2d=False,
        from_pretrained=None,
        micro_frame_size=17,
        scale=[3.85, 2.32, 2.33, 3.06],
        shift=[-0.1, 0.34, 0.27, 0.98],
        vae_2d={
            "from_pretrained": "PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers",
            "local_files_only": False,
            "micro_batch_size": 4,
            "subfolder": "vae",
            "type": "VideoAutoencoderKL",
        },
        vae_temporal={"from_pretrained": None, "type": "VAE_Temporal_SD"},
    )
    assert config == OPENSORA_VAE_V1_2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_vae_of_frames_has_the_names_and_bits_of_the_librarys(dtype):
    from diffusers import AutoencoderKL

    from movd.vae_frames import FrameVAE

    shape = {
        "block_out_channels": (8, 16, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "layers_per_block": 2,
        "norm_num_groups": 4,
    }
    theirs, ours = AutoencoderKL(**shape).eval().to(dtype), FrameVAE(shape).eval().to(dtype)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x, z = torch.linspace(-1, 1, 2 * 3 * 24 * 16), torch.linspace(-2, 2, 2 * 4 * 6 * 4)
    x, z = x.reshape(2, 3, 24, 16).to(dtype), z.reshape(2, 4, 6, 4).to(dtype)
    with torch.no_grad():
        assert torch.equal(ours.encoder(x), theirs.encoder(x))
        assert torch.equal(ours.decoder(z), theirs.decoder(z))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"spatial": {"act_fn": "relu"}}, "act_fn 'relu' is not supported, 'silu' is"),
        ({"micro_frame": 17}, "'micro_frame'; did you mean 'micro_frame_size'"),
        ({"micro_z_frame_size": 4}, "micro_z_frame_size = 4.*make 5 latent"),
        ({"vae_temporal": {"type": "VAE_Temporal"}}, "vae_temporal.type = 'VAE_Temporal'"),
        ({"spatial": {"block_channels": [4]}}, r"AutoencoderKL has no \['block_channels'\]"),
        ({"temporal": {"filter": 4}}, "'filter'; did you mean 'filters'"),
    ],
)
def test_a_config_of_something_else_is_refused_by_name(given, message):
    with pytest.raises(ConfigError, match=message):
        OpenSoraVAEConfig(**given)
