"""Detectors: the network inside, cut out, quantized, written, put back."""

import pytest
import torch
from torch import nn
from torchvision.models import detection
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from mep.graph import worst_sqnr_db
from mep.quant import core_inputs, core_of, export_int8, from_file, quantize, with_core
from mep.store import content_hash

pytestmark = pytest.mark.filterwarnings("ignore")


def pictures(n=8):
    random = torch.Generator().manual_seed(0)
    return [torch.rand(3, 70 + 4 * i, 96, generator=random) for i in range(n)]


def body():
    return resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d)


@pytest.fixture(scope="module", params=["one stage", "two stages"])
def detector(request):
    torch.manual_seed(0)
    size = dict(num_classes=4, min_size=96, max_size=128)
    if request.param == "one stage":
        net = detection.RetinaNet(body(), score_thresh=0.005, detections_per_img=20, **size)
    else:
        net = detection.FasterRCNN(
            body(), box_score_thresh=0.005, box_detections_per_img=20, **size
        )
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = None
    with torch.no_grad():
        net.train().backbone(core_inputs(net, pictures()))
    return net.eval()


def found(net, images):
    with torch.no_grad():
        return net(images)


def agree(a, b, within):
    for one, other in zip(a, b):
        assert len(one["boxes"])
        torch.testing.assert_close(one["boxes"], other["boxes"], atol=within, rtol=0)
        assert torch.equal(one["labels"], other["labels"])


def test_cut_out_and_put_back_nothing_changes(detector):
    before = content_hash(dict(detector.state_dict()))
    some = pictures(2)
    want = found(detector, some)
    agree(want, found(with_core(detector, core_of(detector)), some), 1e-3)
    assert content_hash(dict(detector.state_dict())) == before
    agree(want, found(detector, some), 0)


def test_the_file_finds_what_the_simulation_finds(detector, tmp_path):
    x = core_inputs(detector, pictures())
    core = core_of(detector)
    qm = quantize(core, x, per_channel=True, progress=False)
    check = export_int8(qm, tmp_path / "core.onnx")
    assert check.integer_macs == 1
    with torch.no_grad():
        assert worst_sqnr_db(core(x)["maps"], qm(x)["maps"]) > 10
    some = pictures(2)
    size = x.shape[-2:]
    deployed = with_core(detector, from_file(tmp_path / "core.onnx", qm, x), size)
    agree(found(with_core(detector, qm, size), some), found(deployed, some), 1e-3)
    with pytest.raises(ValueError, match="the core takes"):
        found(with_core(detector, qm, (64, 64)), some)


def test_training_mode_stays_as_it_was(detector):
    detector.train()
    core_inputs(detector, pictures(2))
    assert detector.training and detector.backbone.training
    detector.eval()


@pytest.mark.parametrize(
    "net, says",
    [
        (nn.Linear(2, 2), "Linear has no module 'transform'"),
        (
            nn.ModuleDict(dict(transform=nn.Identity(), backbone=nn.Identity())),
            "neither head nor rpn.head",
        ),
    ],
)
def test_what_is_no_detector_is_refused(net, says):
    with pytest.raises(TypeError, match=says):
        core_of(net)
    with pytest.raises(TypeError, match=says):
        with_core(net, nn.Identity())
