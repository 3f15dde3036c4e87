"""One file per paper: a frozen Config and one Module; MODELS maps the names that studies use."""

from rankjax.models import dcnv2, dlrm, hstu, rankmixer

MODELS = {
    "dlrm_mlp": dlrm.DLRMMLP,
    "dcnv2_din": dcnv2.DCNv2,
    "rankmixer": rankmixer.RankMixer,
    "hstu": hstu.HSTU,
}
