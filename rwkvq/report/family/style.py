"""What the family page adds to the style sheet of the report: the same colours, letters and distances."""

from __future__ import annotations

from rwkvq.report.plots import SHADES
from rwkvq.report.style import style_sheet

_FAMILY = """
a{color:var(--strong);text-decoration:none}
a:hover,a:focus-visible{text-decoration:underline}
h3 span{color:var(--quiet);font-weight:400;margin-left:.5em}
h3{overflow-wrap:anywhere}
.note{overflow-wrap:anywhere}
.card h2,.card dt{overflow-wrap:anywhere}
.panels{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr));gap:34px 30px}
.four{grid-template-columns:repeat(4,1fr)}
.panels>*{min-width:0}
.panels h3{margin:0}
.panel{margin:44px 4px 46px 44px;max-width:520px}
.panel svg{overflow:visible;display:block}
.panel .axis,.panel .tick{font-size:11.5px}
.notch{stroke:var(--quiet)}
.spot{fill:var(--quiet)}
.spot text{font-size:12px;fill:var(--quiet);paint-order:stroke;stroke:var(--page);stroke-width:3px;
stroke-linejoin:round}
.spot circle{fill:var(--page);stroke:var(--quiet);stroke-width:1.6}
.front text{fill:var(--text);font-weight:600}
.front circle{fill:var(--strong);stroke:var(--strong)}
.whisker{stroke:var(--quiet);stroke-width:1.4}
.front .whisker{stroke:var(--strong)}
.leader{stroke:var(--none);stroke-width:1;fill:none}
.models{font-size:13.5px}
.models th,.models td{padding:6px 9px}
.models .group th{padding-top:18px;font-weight:600;color:var(--text)}
.models tbody th{min-width:84px;max-width:230px;overflow-wrap:anywhere}
.models .base{color:var(--quiet)}
.models .best b{font-weight:700}
.models .state{color:var(--quiet)}
.models .failed .state{color:var(--sq);font-weight:600}
.models .se{font-size:11.5px}
.failure{border-left:3px solid var(--sq);padding:1px 0 1px 12px;margin:0 0 16px}
.failure p{margin:0;max-width:110ch;overflow-wrap:anywhere}
.failure .note{margin:2px 0 0}
.waiting b{color:var(--text)}
.maps h3{margin:26px 0 4px}
.maps summary{font-weight:400;padding:9px 0}
summary b{font-weight:600;overflow-wrap:anywhere}
.maps details>div{padding-top:2px}
.maps details .lead{font-size:13px;margin:0 0 6px}
.strips{font-size:12px}
.strips th{font-weight:400;color:var(--quiet);text-align:right;padding:0 8px 0 0;white-space:nowrap;
position:sticky;left:0;background:var(--page)}
.strips td{padding:0;line-height:0}
.strips svg{display:block;overflow:visible}
.strips path{stroke-width:15;stroke-dasharray:12 1}
.strips .m0{stroke:var(--none);stroke-width:1;stroke-dasharray:0 4 5 4}
.strips .x0{stroke:var(--sq);stroke-width:2}
.panels .lead{font-size:13px;margin:2px 0 0;min-height:3em}
.planes .plane{height:300px;margin:30px 4px 50px 44px}
.planes .key{font-size:12.5px;gap:3px 18px}
.stacked{margin-bottom:18px}
.stacked li{grid-template-columns:minmax(92px,140px) 1fr 88px}
.stacked span{overflow-wrap:anywhere;line-height:1.25}
.stacked div{display:flex;gap:1px}
.times h3{margin:18px 0 2px}
.facts-of h3{margin:22px 0 2px;font-size:14px}
.stage-windows{background:var(--p-head)!important}
.stage-activations{background:var(--p-elementwise)!important}
.stage-proxies{background:var(--p-keep)!important}
.stage-gradients{background:var(--e3)!important}
.stage-curves{background:var(--e4)!important}
.stage-plan{background:var(--p-emb)!important}
.stage-quantize{background:var(--p-matrix)!important}
.stage-distill{background:var(--e6)!important}
.stage-pack{background:var(--p-lora)!important}
.stage-evaluate{background:var(--e5)!important}
.stage-report{background:var(--e2)!important}
.stage-other{background:var(--none)!important}
"""

_PHONE = """
@media (max-width:760px){
.models{font-size:13px}
.models .se{display:block;margin:0;font-size:11px}
.models thead th:first-child,.models tr:not(.group) th:first-child{position:sticky;left:0;background:var(--page)}
.models tbody th{max-width:120px;padding-right:10px}
.four{grid-template-columns:1fr 1fr}
.stacked li{grid-template-columns:84px 1fr 76px;gap:8px}
}
@media print{
.panels>*,.failure,.stacked li,.models tr,.plane{break-inside:avoid}
h2,h3{break-after:avoid}
.models{font-size:10px}
.models th,.models td{padding:4px}
.models .se{display:block;margin:0;font-size:8.5px}
}
"""


def _strips() -> str:
    """Colours of the strips of deep maps."""
    return "".join(
        f".bits .s{step}{{stroke:var(--b{step})}}.error .s{step}{{stroke:var(--e{step})}}" for step in range(SHADES)
    )


def family_style_sheet() -> str:
    """All rules of the page, in the order in which they must stand."""
    return style_sheet() + _FAMILY + _strips() + _PHONE
