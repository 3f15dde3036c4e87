"""One file per paper: a frozen Config and one Module; MODELS maps the names that studies use."""

from rankjax.models import (
    autoint,
    dcnv2,
    din,
    dlrm,
    dlrm_v3,
    grab,
    hhft,
    hiformer,
    hstu,
    mtgr,
    onetrans,
    rankmixer,
    tokenmixer_large,
    transformer,
    wukong,
)

MODELS = {
    "dlrm_mlp": dlrm.DLRMMLP,
    "dlrm": dlrm.DLRMDot,
    "dcnv2_din": dcnv2.DCNv2,
    "din": din.DIN,
    "autoint": autoint.AutoInt,
    "wukong": wukong.Wukong,
    "transformer": transformer.Transformer,
    "heteroatt": hiformer.HeteroAtt,
    "hiformer": hiformer.Hiformer,
    "hhft": hhft.HHFT,
    "rankmixer": rankmixer.RankMixer,
    "tokenmixer_large": tokenmixer_large.TokenMixerLarge,
    "hstu": hstu.HSTU,
    "dlrm_v3": dlrm_v3.DLRMv3,
    "mtgr": mtgr.MTGR,
    "grab": grab.GRAB,
    "onetrans": onetrans.OneTrans,
}
