"""Networks as people have them: what is recorded is what they compute, in every method."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from mep.compress import channel_prune, compress, spatial_svd
from mep.compress.channel import channel_groups
from mep.conditional import DynamicConv2d, skip_convert, sparse_conv
from mep.deploy import ExportError, run
from mep.graph import TraceError, is_plain, plain_type, resolve, tensors, trace, worst_sqnr_db
from mep.moments import image_batches
from mep.nas import chop
from mep.quant import adaround, bayesian_bits, dfq, equalize, export_int8, fold_bn, quantize

pytestmark = pytest.mark.filterwarnings("ignore")


class Net(nn.Module):
    "A forward, and the modules and parameters that it uses"

    def __init__(self, forward, **parts):
        super().__init__()
        self.code = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.code(self, x)


def pictures(n=16, c=3, size=16, seed=0):
    return torch.randn(n, c, size, size, generator=torch.Generator().manual_seed(seed))


def settled(net):
    "In evaluation mode, with batch norms that have seen something"
    for m in net.modules():
        if getattr(m, "running_var", None) is not None:
            m.running_var.uniform_(0.5, 1.5)
            m.running_mean.normal_(0, 0.2)
    return net.eval()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def conv(i=3, o=8, k=3, **kw):
    return nn.Conv2d(i, o, k, **kw)


class Named(nn.Conv2d):
    "No forward of its own"


class NamedNorm(nn.BatchNorm2d):
    "No forward of its own"


class Standardised(nn.Conv2d):
    def forward(self, x):
        v, m = torch.var_mean(self.weight, (1, 2, 3), keepdim=True, unbiased=False)
        return F.conv2d(
            x,
            0.3 * (self.weight - m) / (v + 1e-5).sqrt(),
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
        )


class Same(nn.Conv2d):
    "Pads inside, as TensorFlow does"

    def forward(self, x):
        k = self.kernel_size[0] - 1
        return F.conv2d(
            F.pad(x, (k // 2, k - k // 2, k // 2, k - k // 2)), self.weight, self.bias, self.stride
        )


# ---- in place


def _method(s, x):
    y = s.c(x)
    z = y.relu_()
    return y + z


def _module(s, x):
    y = s.c(x)
    z = s.r(y)
    return y + z


def _flag(s, x):
    y = s.c(x)
    F.hardtanh(y, 0, 1, True)
    F.relu(y, inplace=True)
    return y


def _assign(s, x):
    y = s.c(x)
    z = y
    y += x.mean()
    y *= 2
    return z - y.abs()


def _item(s, x):
    y = s.c(x)
    y[:, 0] = 0
    y[:, : 1 + y.shape[1] // 2] *= 2
    y[y < -1] = 5.0
    return y


def _view(s, x):
    y = s.c(x)
    y.flatten(1).clamp_(0, 1)
    a, b = y.chunk(2, 1)
    a.add_(b)
    b.zero_()
    return y, a, b


def _view_before(s, x):
    y = s.c(x)
    v = y.flatten(1)
    y.sigmoid_()
    w = v.t()
    y.copy_(y * 3)
    return v, w, y


def _copy_or_view(s, x):
    y = s.c(x)
    z = y.transpose(1, 2).contiguous()
    s.r(z)
    u = y.contiguous()
    s.r(u)
    return y, z, u


def _input(s, x):
    x -= 1
    x.div_(2)
    return s.c(x)


def _sizes(s, x):
    y = s.c(x)
    n = y.shape[2]
    m = n
    n += 1
    return F.interpolate(y, (m, n))


def _dropped(s, x):
    y = s.c(x)
    z = s.d(y)
    z += 1
    return y.sigmoid_() * z


def _shape(s, x):
    y = s.c(x)
    y.unsqueeze_(1)
    y.fill_(2)
    return y.squeeze(1).mul_(3)


IN_PLACE = [
    _method,
    _module,
    _flag,
    _assign,
    _item,
    _view,
    _view_before,
    _copy_or_view,
    _input,
    _sizes,
    _dropped,
    _shape,
]


@pytest.mark.parametrize("forward", IN_PLACE)
def test_nothing_is_in_place(forward):
    net, x = (
        Net(forward, c=conv(), r=nn.ReLU(inplace=True), d=nn.Dropout(inplace=True)).eval(),
        pictures(2),
    )
    given = x.clone()
    graph = trace(net)
    with torch.no_grad():
        assert worst_sqnr_db(net(x.clone()), graph(x)) > 120
    assert torch.equal(x, given)
    assert not any(
        str(n.target).endswith("_") and not str(n.target).endswith("__")
        for n in graph.graph.nodes
        if n.op == "call_method"
    )


@pytest.mark.parametrize("forward", [_method, _module, _assign])
def test_methods_see_the_function_not_the_writing(forward):
    def build(inplace):
        torch.manual_seed(0)

        def body(s, x):
            return s.h(F.relu(s.e(forward(s, x))).mean([2, 3]))

        net = Net(
            body, c=conv(padding=1), e=conv(8, 8), r=nn.ReLU(inplace=True), h=nn.Linear(8, 4)
        ).eval()
        return net if inplace else trace(net)

    images = pictures(96)
    for method in (
        lambda net: channel_prune(net, images, macs=0.6, progress=False),
        lambda net: quantize(net, images, progress=False),
    ):
        left = [
            worst_sqnr_db(net(images.clone()), method(net)(images.clone()))
            for net in (build(True), build(False))
        ]
        assert left[0] == pytest.approx(left[1], abs=0.5)


def test_a_random_change_in_place_is_refused():
    with pytest.raises(TraceError, match="normal_.*in place"):
        trace(Net(lambda s, x: s.c(x).normal_(), c=conv()))


def test_parts_do_not_overwrite_what_they_are_given():
    def body(s, x):
        y = s.c(x)
        y.clamp_(0, 6)
        return y

    blocks = [
        Net(body, c=conv(i, o, stride=2, padding=1)) for i, o in ((8, 12), (12, 16), (16, 20))
    ]
    net = nn.Sequential(
        conv(3, 8, stride=2, padding=1),
        *blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(20, 10),
    ).eval()
    parts, x = chop(net, (3, 32, 32)), pictures(1, size=32)
    with torch.no_grad():
        for part in (parts.stem, *parts.blocks, parts.head):
            before = x.clone()
            out = part(x)
            assert torch.equal(x, before)
            x = out


# ---- wrappers and recipes


def pruned(m):
    prune.l1_unstructured(m, "weight", 0.5)
    return prune.random_unstructured(m, "weight", 0.1)


DRESSED = dict(
    weight_norm=weight_norm,
    new_weight_norm=parametrizations.weight_norm,
    spectral_norm=spectral_norm,
    new_spectral_norm=parametrizations.spectral_norm,
    orthogonal=parametrizations.orthogonal,
    pruned=pruned,
    compiled=lambda m: torch.compile(m, backend="eager"),
    parallel=nn.DataParallel,
)


def dressed(how):
    return settled(
        nn.Sequential(
            DRESSED[how](conv()),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            conv(8, 8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 4),
        )
    )


@pytest.mark.parametrize("how", DRESSED)
def test_recipes_are_computed_once(how):
    net, x = dressed(how), pictures(4)
    names, want = list(net.state_dict()), net(x)
    bare = resolve(net)
    assert (
        is_plain(bare[0], nn.Conv2d)
        and {"0.weight", "0.bias"} <= set(bare.state_dict())
        and isinstance(bare[0].weight, nn.Parameter)
    )
    assert worst_sqnr_db(want, bare(x)) > 90
    assert list(net.state_dict()) == names and torch.equal(net(x), want), (
        "the caller's network is as it was"
    )


@pytest.mark.parametrize(
    "wrap", [lambda m: torch.compile(m, backend="eager"), nn.DataParallel, lambda m: m]
)
@pytest.mark.parametrize("how", ["weight_norm", "new_weight_norm", "pruned"])
def test_methods_take_dressed_networks(how, wrap):
    net, images = wrap(dressed(how)), pictures(64)
    small = [
        channel_prune(net, images, macs=0.7, progress=False),
        compress(net, images, macs=0.7, progress=False, n_jobs=1, tries=0).model,
        spatial_svd(net, macs=0.9, data=images),
        quantize(net, images, progress=False),
        dfq(net, images, progress=False),
        adaround(net, images, w_bits=8, effort=0, progress=False),
        fold_bn(net),
        equalize(net),
        skip_convert(net, eps=0.0),
    ]
    with torch.no_grad():
        want = net(images)
        for new in small:
            assert worst_sqnr_db(want, new(images)) > 5


def test_training_modes_stay():
    net = nn.Sequential(conv(), nn.BatchNorm2d(8))
    net[1].eval()
    assert [m.training for m in resolve(nn.Sequential(net)).modules()] == [True, True, True, False]


def test_torchscript_is_named():
    with pytest.raises(TypeError, match="TorchScript"):
        trace(torch.jit.script(nn.Sequential(conv()).eval()))


# ---- hooks


def test_hooks_are_recorded():
    net, x = nn.Sequential(conv(), nn.Sequential(nn.ReLU(), conv(8, 8))).eval(), pictures(2)
    net[0].register_forward_hook(lambda m, args, out: 2 * out)
    net[0].register_forward_hook(lambda m, args, out: None)
    net[1].register_forward_hook(lambda m, args, kwargs, out: out - 1, with_kwargs=True)
    net[1][1].register_forward_pre_hook(lambda m, args: (args[0] + 1,))
    net[1].register_forward_pre_hook(lambda m, args: args[0] * 3)
    net.register_forward_pre_hook(lambda m, args: (args[0] / 2,))
    net.register_forward_hook(lambda m, args, out: out.abs())
    net[0].register_full_backward_hook(lambda m, a, b: None)
    assert torch.equal(trace(net, x=x)(x), net(x))
    assert len(net[0]._forward_hooks) == 2 and len(net._forward_hooks) == 1
    assert worst_sqnr_db(net(x), quantize(net, x, progress=False)(x)) > 20


def test_hooks_survive_where_the_network_itself_is_changed():
    net, images = resolve(dressed("parallel")), pictures(64)
    net[3].register_forward_hook(lambda m, args, out: 2 * out)
    for new in (
        compress(net, images, macs=0.7, progress=False, n_jobs=1, tries=0).model,
        channel_prune(net, images, macs=0.7, progress=False),
    ):
        assert worst_sqnr_db(net(images), new(images)) > 5
    with torch.no_grad():
        video = skip_convert(net, eps=0.0)
        video(images[:1])
        assert worst_sqnr_db(net(images[1:2]), video(images[1:2])) > 80


def test_a_hook_that_cannot_be_recorded_is_named():
    net = nn.Sequential(conv())

    def logs(m, args, out):
        print(float(out.mean()))

    net[0].register_forward_hook(logs)
    with pytest.raises(TraceError, match="hook logs of 0.*handle.remove"):
        trace(net)


# ---- whose code runs


def hooked(m):
    m.register_forward_hook(lambda m, args, out: out)
    return m


def patched(m):
    m.forward = lambda x: F.conv2d(x, m.weight) * 2
    return m


@pytest.mark.parametrize(
    "m, want",
    [
        (conv(), nn.Conv2d),
        (Named(3, 8, 3), nn.Conv2d),
        (Standardised(3, 8, 3), None),
        (Same(3, 8, 3), None),
        (hooked(conv()), None),
        (patched(conv()), None),
        (parametrizations.weight_norm(conv()), None),
        (NamedNorm(8), nn.BatchNorm2d),
        (nn.Sequential(conv()), None),
        (Net(_method), None),
        (nn.ReLU(), nn.ReLU),
    ],
)
def test_plain_type(m, want):
    assert plain_type(m) is want
    assert is_plain(m, nn.Conv2d) is (want is nn.Conv2d)


@pytest.mark.parametrize("cls", [Standardised, Same])
def test_frames_of_layers_with_a_forward_of_their_own(cls):
    net = nn.Sequential(
        cls(3, 32, 3, padding=1), nn.ReLU(), cls(32, 32, 3, padding=1), nn.ReLU(), conv(32, 8)
    ).eval()
    with pytest.warns(UserWarning, match="0, 2: convolutions with a forward"):
        video = skip_convert(net, eps=0.0)
    assert list(video.layers()) == ["4"]
    a = pictures(1, size=48)
    b = a.clone()
    b[..., 10:14, 10:14] = 1.0
    with torch.no_grad():
        video(a)
        assert worst_sqnr_db(net(b), video(b)) > 80


def test_masks_refuse_layers_with_a_forward_of_their_own():
    x, mask = pictures(1), torch.ones(1, 1, 14, 14)
    for layer in (Standardised(3, 8, 3), hooked(conv())):
        with pytest.raises(TypeError, match="of its own"):
            sparse_conv(x, layer, mask)
        with pytest.raises(TypeError, match="of its own"):
            DynamicConv2d(layer)


@pytest.mark.parametrize("cls", [Standardised, Same])
def test_compression_leaves_layers_with_a_forward_of_their_own(cls):
    net, images = (
        nn.Sequential(
            cls(3, 16, 3),
            nn.ReLU(),
            conv(16, 32),
            nn.ReLU(),
            conv(32, 16),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(16, 4),
        ).eval(),
        pictures(128),
    )
    new, report = compress(net, images, macs=0.6, progress=False, n_jobs=1, tries=0)
    assert (
        type(new[0]) is cls
        and torch.equal(new[0].weight, net[0].weight)
        and worst_sqnr_db(net(images), new(images)) > 10
    )
    assert type(spatial_svd(net, macs=0.5, data=images)[0]) is cls


# ---- simulated and in the file


def head(c=8):
    return dict(h=nn.Linear(c, 5))


def gate(s, x):
    return s.h(F.relu(s.c(x) + torch.sigmoid(s.g) * s.d(x)).mean([2, 3]))


def fusion(s, x):
    w = F.relu(s.w)
    w = w / (w.sum() + 1e-4)
    return s.h(F.relu(w[0] * s.c(x) + w[1] * s.d(x)).mean([2, 3]))


def functional(s, x):
    return F.linear(F.relu(F.conv2d(x, s.w, None, 2, 1)).mean([2, 3]), s.v, s.b)


def tokens(s, x):
    return s.h(F.relu(s.bn(s.l(s.c(x).flatten(2)))).mean(2))


def converted(s, x):
    return s.h(F.relu(s.c(x).cpu()).to(torch.float32).float().mean([2, 3]))


def pooled(*layers):
    return nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


def parameter(*size):
    return nn.Parameter(torch.randn(size) * 0.3)


def attended(s, x):
    t = s.c(x).flatten(2).transpose(1, 2)
    return s.h((t + s.m(t, t, t, need_weights=False)[0]).mean(1))


def class_token(s, x):
    t = s.c(x).flatten(2).transpose(1, 2)
    return s.h(torch.cat([s.t.expand(x.shape[0], -1, -1), t], 1).tanh()[:, 0] + t.mean(1))


def spatial(s, x):
    y = F.relu(s.c(x))
    return s.h(
        (
            y
            * torch.sigmoid(s.d(torch.cat([y.mean(1, keepdim=True), y.max(1, keepdim=True)[0]], 1)))
        ).mean([2, 3])
    )


def unbound(s, x):
    n, c, h, w = x.shape
    a, b = F.relu(s.c(x)).view(n, 2, 4, 14, 14).unbind(1)
    return s.h((a * b).mean([2, 3]))


FILES = dict(  # network -> (it, layers on integers)
    fusion=lambda: (Net(fusion, c=conv(), d=conv(), w=parameter(2), **head()), 3),
    gate=lambda: (Net(gate, c=conv(), d=conv(), g=parameter(1), **head()), 3),
    functional=lambda: (
        Net(functional, w=parameter(8, 3, 3, 3), v=parameter(5, 8), b=parameter(5)),
        2,
    ),
    standardised=lambda: (pooled(Standardised(3, 8, 3)), 2),
    same=lambda: (pooled(Same(3, 8, 3, 2)), 2),
    named=lambda: (pooled(Named(3, 8, 3), NamedNorm(8)), 2),
    sync=lambda: (nn.SyncBatchNorm.convert_sync_batchnorm(pooled(conv(), nn.BatchNorm2d(8))), 2),
    tokens=lambda: (
        Net(
            tokens,
            c=conv(3, 10, 4, stride=4),
            l=nn.Linear(16, 6),
            bn=nn.BatchNorm1d(10),
            h=nn.Linear(10, 4),
        ),
        2,
    ),
    as_many_tokens=lambda: (
        Net(
            tokens,
            c=conv(3, 16, 4, stride=4),
            l=nn.Linear(16, 16),
            bn=nn.BatchNorm1d(16),
            h=nn.Linear(16, 4),
        ),
        2,
    ),
    no_affine=lambda: (nn.Sequential(*pooled(conv()), nn.BatchNorm1d(5, affine=False)), 2),
    converted=lambda: (Net(converted, c=conv(), **head()), 2),
    called_to=lambda: (nn.Sequential(nn.ModuleDict({"type_": pooled(conv())})["type_"]), 2),
    attended=lambda: (
        Net(
            attended,
            c=conv(3, 16, 4, stride=4),
            m=nn.MultiheadAttention(16, 4, batch_first=True),
            **head(16),
        ),
        2,
    ),
    class_token=lambda: (
        Net(class_token, c=conv(3, 16, 4, stride=4), t=parameter(1, 1, 16), **head(16)),
        2,
    ),
    spatial=lambda: (Net(spatial, c=conv(), d=conv(2, 1, 7, padding=3), **head()), 3),
    unbound=lambda: (Net(unbound, c=conv(), **head(4)), 2),
    shuffle=lambda: (pooled(conv(3, 12), nn.ReLU(), nn.ChannelShuffle(3), conv(12, 8)), 3),
    response=lambda: (pooled(conv(), nn.ReLU(), nn.LocalResponseNorm(5), conv(8, 8)), 3),
)


@pytest.mark.parametrize("name", FILES)
def test_simulated_and_written(name, tmp_path):
    net, integers = FILES[name]()
    net, x, fresh = settled(net), pictures(16), pictures(5, seed=1)
    qm = quantize(net, x, w_bits=7, progress=False)
    check = export_int8(qm, tmp_path / "a.onnx")
    with torch.no_grad():
        assert worst_sqnr_db(net(fresh), qm(fresh)) > 15
        for n in (1, 5):
            assert (
                worst_sqnr_db(
                    qm(fresh[:n]),
                    torch.as_tensor(run(tmp_path / "a.onnx", fresh[:n], batch_size=n)),
                )
                > 35
            )
    assert check.integer_layers >= integers - (name in ("tokens", "as_many_tokens"))


def test_the_mean_of_a_video(tmp_path):
    net = Net(
        lambda s, x: s.h(F.relu(s.c(x)).mean([-2, -1]).mean(2)), c=nn.Conv3d(2, 8, 3), **head()
    ).eval()
    x = torch.randn(8, 2, 6, 10, 10)
    for qm in (quantize(net, x, w_bits=7, progress=False), dfq(net, x, w_bits=7, progress=False)):
        assert worst_sqnr_db(net(x), qm(x)) > 20


def test_cancellation_is_nobodys_fault():
    net = nn.Sequential(conv(), nn.BatchNorm2d(8), nn.ReLU()).eval()
    x = 30000 + 5 * pictures(8)
    y = net[0](x).detach()
    net[1].running_mean.copy_(y.mean((0, 2, 3)))
    net[1].running_var.copy_(y.var((0, 2, 3)))
    quantize(net, x, progress=False)


# ---- names and outputs


def flat(out):
    return (
        [torch.as_tensor(o) for o in (out.values() if isinstance(out, dict) else out)]
        if isinstance(out, (dict, list, tuple))
        else [torch.as_tensor(out)]
    )


def both(s, x):
    y = F.relu(s.a(x))
    return [s.b(y), y.mean([2, 3])], {"c3": s.c(y), "none": None}


@pytest.mark.parametrize(
    "net, names",
    [
        (
            lambda: Net(lambda s, x: s.logits(F.relu(s.a(x))), a=conv(), logits=conv(8, 4)),
            ["logits"],
        ),
        (lambda: Net(lambda s, y: s.x(F.relu(s.input(y))), input=conv(), x=conv(8, 4)), ["logits"]),
        (
            lambda: Net(lambda s, x: s.add(s.a(x) + s.b(x)), a=conv(), b=conv(), add=conv(8, 4)),
            ["logits"],
        ),
        (
            lambda: Net(lambda s, x: {"a": F.relu(s.a(x)), "b": s.b(x)}, a=conv(), b=conv()),
            ["a", "b"],
        ),
        (
            lambda: Net(both, a=conv(), b=conv(8, 4), c=conv(8, 2)),
            ["output_0_0", "output_0_1", "output_1_c3"],
        ),
        (lambda: Net(lambda s, x: s.a(x).argmax(1), a=conv()), ["logits"]),
    ],
)
def test_names_of_layers_and_outputs(net, names, tmp_path):
    import onnx

    net, x = net().eval(), pictures(8)
    qm = quantize(net, x, w_bits=7, progress=False)
    export_int8(qm, tmp_path / "a.onnx")
    assert [o.name for o in onnx.load(tmp_path / "a.onnx").graph.output] == names
    with torch.no_grad():
        pairs = zip(tensors(qm(x)), flat(run(tmp_path / "a.onnx", x)))
    assert all(worst_sqnr_db(a.float(), b.float()) > 35 for a, b in pairs)
    assert all(q.on for q in qm.quantizers().values()), (
        "a name that two have would leave one without a grid"
    )


def test_what_onnx_lacks_is_named(tmp_path):
    def body(s, x):
        return s.b(torch.special.i1(F.relu(s.a(x))))

    net = Net(body, a=conv(padding=1), b=conv(8, 2)).eval()
    with pytest.raises(ExportError, match="special_i1.*can't be written as ONNX"):
        export_int8(quantize(net, pictures(), progress=False), tmp_path / "a.onnx")


def test_pooling_by_index_and_back(tmp_path):
    def body(s, x):
        y, i = s.p(F.relu(s.a(x)))
        return s.b(s.u(y, i))

    parts = dict(p=nn.MaxPool2d(2, return_indices=True), u=nn.MaxUnpool2d(2))
    net = Net(body, a=conv(padding=1), b=conv(8, 2), **parts).eval()
    qm = quantize(net, pictures(), progress=False)
    assert export_int8(qm, tmp_path / "a.onnx").sqnr_db > 60


def two(kind):
    def body(s, x):
        y = F.relu(s.n(s.a(x)))
        outs = s.b(F.relu(s.d(y)).mean([2, 3])), s.c(y.mean([2, 3]))
        return dict(zip(("out", "aux"), outs)) if kind is dict else kind(outs)

    return settled(
        Net(
            body,
            a=conv(3, 16),
            n=nn.BatchNorm2d(16),
            d=conv(16, 16),
            b=nn.Linear(16, 10),
            c=nn.Linear(16, 2),
        )
    )


@pytest.mark.parametrize("kind", [tuple, list, dict, lambda outs: [outs[0], (outs[1],)]])
def test_several_outputs(kind):
    net, images = two(kind), pictures(128)
    for new in (
        dfq(net, images, w_bits=7, progress=False),
        compress(net, images, macs=0.7, progress=False, n_jobs=1, tries=1).model,
    ):
        with torch.no_grad():
            assert worst_sqnr_db(net(images), new(images)) > 8


@pytest.mark.parametrize("kind", [tuple, dict])
def test_training_on_several_outputs_needs_a_loss(kind):
    net, data = two(kind), [(pictures(8), torch.zeros(8, dtype=torch.long))]
    with pytest.raises(ValueError, match="2 outputs.*loss="):
        bayesian_bits(net, data, epochs=1, finetune=0, progress=False)

    def loss(out, y):
        return F.cross_entropy(tensors(out)[0], y)

    qm = bayesian_bits(net, data, epochs=1, finetune=0, progress=False, loss=loss)
    assert len(tensors(qm(data[0][0]))) == 2


# ---- channels

CHANNELS = dict(
    prelu=[nn.PReLU(16)],
    norm=[nn.ReLU(), nn.BatchNorm2d(16)],
    pool_norm=[nn.MaxPool2d(2), nn.BatchNorm2d(16), nn.ReLU()],
    instance=[nn.InstanceNorm2d(16, affine=True), nn.ReLU()],
    bare_instance=[nn.InstanceNorm2d(16), nn.ReLU()],
    sync=[nn.SyncBatchNorm(16), nn.ReLU()],
)


@pytest.mark.parametrize("between", CHANNELS)
def test_what_stands_between_loses_channels_too(between):
    layers = copy.deepcopy(CHANNELS[between])
    net, images = (
        settled(
            nn.Sequential(
                conv(3, 16),
                *layers,
                conv(16, 16),
                nn.ReLU(),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
                nn.Linear(16, 10),
            )
        ),
        pictures(256),
    )
    new, report = compress(net, images, macs=0.5, methods=("channel",), progress=False, n_jobs=1)
    assert report.share <= 0.5 and len(new[0].weight) < 16
    with torch.no_grad():
        assert worst_sqnr_db(net(images), new(images)) > 10
    with torch.no_grad():
        assert (
            worst_sqnr_db(net(images), channel_prune(net, images, macs=0.5, progress=False)(images))
            > 10
        )


@pytest.mark.parametrize(
    "move",
    [
        lambda x: torch.roll(x, 2, 1),
        lambda x: torch.roll(x, 8, 1),
        lambda x: x.flip(1),
        nn.ChannelShuffle(4),
        nn.ChannelShuffle(8),
        lambda x: x[:, [0, 3, 2, 1, *range(4, 16)]],
        lambda x: x.softmax(1),
    ],
)
def test_channels_that_move_are_locked(move):
    move_by = move

    def body(s, x):
        return s.h(F.relu(s.b(s.move(F.relu(s.a(x))))).mean([2, 3]))

    move = move if isinstance(move, nn.Module) else Net(lambda s, x: move_by(x))
    net = Net(body, a=conv(3, 16), b=conv(16, 16), h=nn.Linear(16, 10), move=move)
    locked = {g.name: g.locked for g in channel_groups(net.eval(), (3, 16, 16))}
    assert "mix" in locked["a"] and not locked["b"]


# ---- images


@pytest.mark.parametrize(
    "batches",
    [
        [{"pixel_values": pictures(4), "labels": torch.zeros(4)}],
        [{"labels": torch.zeros(4), "data": pictures(4)}],
        [({"image": pictures(4)}, 1)],
        [(pictures(4), 1)],
    ],
)
def test_batches_as_people_have_them(batches):
    assert torch.equal(image_batches(batches)[0], pictures(4))


@pytest.mark.parametrize(
    "batches, says",
    [
        ([{"a": pictures(2), "b": pictures(2)}], "dicts with the entries a, b"),
        ([{"labels": torch.zeros(4)}], "dicts"),
        (
            [pictures(2), pictures(2, size=20)],
            r"several sizes, \[3, 16, 16\] in batch 0 and \[3, 20, 20\] in batch 1",
        ),
        ([("a", 1)], "str"),
    ],
)
def test_batches_that_cannot_be_used(batches, says):
    with pytest.raises(ValueError, match=says):
        quantize(nn.Sequential(conv()), batches, progress=False)


# ---- messages


def test_optional_arguments_have_their_defaults():
    class Optional(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = conv()

        def forward(self, x, features=False, scale=(1, 2), *more, mask=None, **rest):
            y = self.a(x) * scale[1]
            if features or mask is not None:
                return y
            return y.mean([2, 3])

    x = pictures(2)
    net = Optional().eval()
    graph = trace(net, x=x)
    assert (
        torch.equal(graph(x), net(x)) and sum(n.op == "placeholder" for n in graph.graph.nodes) == 1
    )


class TwoInputs(nn.Module):
    def forward(self, x, y):
        return x + y


class Restless(nn.Module):
    def forward(self, x):
        return x + torch.rand(1)


class Fixed(nn.Module):
    def forward(self, x):
        return x if float(x.mean()) > 0 else -x


@pytest.mark.parametrize(
    "net, says",
    [
        (TwoInputs(), r"several inputs \(x, y\).*not supported"),
        (nn.Sequential(conv()).bfloat16(), "bfloat16.*float32"),
        (nn.Sequential(conv()).half(), "float16.*float32"),
        (Restless(), "two answers to the same images"),
        (Fixed(), "test_capture.py, line"),
    ],
)
def test_messages(net, says):
    with pytest.raises(TraceError, match=says) as e:
        trace(net.eval(), x=pictures(2))
    assert "tlparse" not in str(e.value) and "While executing" not in str(e.value)


def test_the_layer_where_it_starts_is_named():
    def body(s, x):
        y = s.b(s.a(x) * (2 if type(x) is torch.Tensor else 1))
        return s.c(y)

    with pytest.raises(TraceError, match="starts at the layer 'b'"):
        trace(Net(body, a=conv(), b=conv(8, 8), c=conv(8, 8)), x=pictures(2))


def test_images_that_do_not_fit_are_named_without_noise():
    with pytest.raises(ValueError, match="do not fit the network at '0'") as e:
        trace(nn.Sequential(conv()), x=pictures(2, c=4))
    assert "tlparse" not in str(e.value)
