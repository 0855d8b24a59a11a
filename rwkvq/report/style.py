"""The style sheet of the page: one column of sections, wide things scroll inside themselves, light and dark."""

from __future__ import annotations

_COLOURS = """
:root{color-scheme:light dark;
--page:#fff;--card:#f5f6f8;--text:#16191d;--quiet:#5d6672;--line:#dfe3e8;--strong:#0b63ce;--strong-soft:#e8f1fd;
--sq:#c2500a;--vq:#0b63ce;--none:#98a1ac;
--b0:#eef4fc;--b1:#d9e7f9;--b2:#c0d8f5;--b3:#a1c4ee;--b4:#7dade5;--b5:#5793d9;--b6:#3578c8;--b7:#1d5dae;--b8:#0f438a;
--e0:#fdf3e7;--e1:#fbe5ca;--e2:#f8d2a6;--e3:#f4ba7d;--e4:#ee9d55;--e5:#e27e34;--e6:#cb611e;--e7:#a84912;--e8:#80340a;
--low-text:#16191d;--high-text:#fff;
--p-matrix:#0b63ce;--p-lora:#6aa5ea;--p-elementwise:#12a594;--p-keep:#7cc9bd;--p-emb:#6b7684;--p-head:#98a1ac;--p-rest:#cdd3da}
@media (prefers-color-scheme:dark){:root{
--page:#111418;--card:#1a1f25;--text:#e7eaee;--quiet:#98a3b0;--line:#2c333c;--strong:#6cb0ff;--strong-soft:#17293f;
--sq:#ff9a4d;--vq:#6cb0ff;--none:#6f7a87;
--b0:#16202c;--b1:#182b41;--b2:#1b3857;--b3:#1f4770;--b4:#27598c;--b5:#3470ab;--b6:#4b8aca;--b7:#72aae6;--b8:#a8cffa;
--e0:#241a12;--e1:#352112;--e2:#4a2b13;--e3:#633715;--e4:#804619;--e5:#a05a20;--e6:#c4732f;--e7:#e5954f;--e8:#fcc28d;
--low-text:#e7eaee;--high-text:#0d1014;
--p-matrix:#4b95ee;--p-lora:#27598c;--p-elementwise:#2bbfae;--p-keep:#1d7d73;--p-emb:#7b8794;--p-head:#56606c;--p-rest:#363e48}}
"""

_TEXT = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--text);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif;font-variant-numeric:tabular-nums}
main{max-width:1080px;margin:0 auto;padding:28px 20px 56px}
h1{font-size:30px;line-height:1.15;margin:2px 0 6px;letter-spacing:-.02em;overflow-wrap:anywhere}
h2{font-size:20px;line-height:1.25;margin:0 0 6px;letter-spacing:-.01em}
h3{font-size:15px;margin:0 0 10px}
p{margin:0 0 10px;max-width:72ch}
section{margin-top:44px}
.kicker{color:var(--strong);font-weight:600;font-size:13px;margin:0}
.quiet,.note{color:var(--quiet)}
.note{font-size:13px;margin:5px 0 0;max-width:110ch}
.lead{color:var(--quiet);margin:0 0 14px}
header .lead{margin:0}
.scroll+.note{margin-top:12px}
.warn{border-left:3px solid var(--sq);padding-left:10px;color:var(--text)}
.two{display:grid;grid-template-columns:1fr 1fr;gap:36px}
.deep{grid-template-columns:1fr}
.two>*{min-width:0}
.cards{display:grid;grid-template-columns:repeat(3,1fr);gap:12px;margin-top:24px}
.card{background:var(--card);border-radius:10px;padding:14px 16px 13px;min-width:0}
.card h2{font-size:13px;font-weight:600;color:var(--quiet);letter-spacing:0;margin:0 0 8px}
.card dl{display:flex;flex-wrap:wrap;gap:4px 22px;margin:0}
.card dl div{display:flex;flex-direction:column-reverse}
.card dt{font-size:12px;color:var(--quiet);line-height:1.3}
.card dd{margin:0;font-size:24px;line-height:1.2;font-weight:500;letter-spacing:-.02em;
color:var(--quiet);white-space:nowrap}
.card dl div:last-child dd,.card .all dd{color:var(--text);font-weight:650}
.card p{font-size:12.5px;color:var(--quiet);margin:8px 0 0;min-height:1.5em}
"""

_TABLES = """
.scroll{overflow-x:auto;-webkit-overflow-scrolling:touch}
table{border-collapse:collapse;font-size:14px}
.rows{width:100%}
.rows th,.rows td{padding:7px 12px;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
.rows th:first-child,.rows td:first-child{padding-left:0}
.rows th:last-child,.rows td:last-child{padding-right:0}
.rows thead th{font-size:12.5px;font-weight:600;color:var(--quiet);vertical-align:bottom;white-space:nowrap}
.rows tbody th{font-weight:400}
.rows .r{text-align:right;white-space:nowrap}
.rows .strong{background:var(--strong-soft);font-weight:600}
.rows .strong,.rows .strong:last-child{padding-right:12px}
.rows thead .strong{color:var(--strong)}
.se{color:var(--quiet);font-weight:400;font-size:12.5px;margin-left:.35em}
.counted tbody th{white-space:nowrap}
.what{color:var(--quiet);font-size:13px}
.long{font-size:12.5px}
.long td,.long th{padding:4px 10px;white-space:nowrap}
.long td:last-child{white-space:normal;min-width:220px;color:var(--quiet)}
.long .group th{padding-top:14px;font-weight:600;color:var(--text)}
.facts tbody th{color:var(--quiet);white-space:nowrap}
.facts td:last-child{color:var(--text);font-size:12px;overflow-wrap:anywhere;min-width:180px;
font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.swatch{display:inline-block;width:10px;height:10px;border-radius:2px;margin-right:8px}
details{border-top:1px solid var(--line)}
details:last-of-type{border-bottom:1px solid var(--line)}
summary{cursor:pointer;padding:13px 0;font-weight:600}
summary span{color:var(--quiet);font-weight:400;margin-left:.4em}
summary:focus-visible{outline:2px solid var(--strong);outline-offset:2px}
details>div{padding-bottom:18px}
"""

_PICTURES = """
.plane{height:360px;margin:34px 8px 54px 46px}
.plane svg{overflow:visible;display:block}
.grid{stroke:var(--line);stroke-width:1}
.frame{fill:none;stroke:var(--line)}
.region{fill:var(--sq);opacity:.09}
.tick,.axis{fill:var(--quiet);font-size:12px}
.axis{font-weight:600;fill:var(--text)}
.tau{stroke:var(--text);stroke-width:1.2;stroke-dasharray:5 4}
.tau-name{font-size:12px;font-weight:600;fill:var(--text);paint-order:stroke;stroke:var(--page);stroke-width:4px;stroke-linejoin:round}
.mark{stroke-width:1.4;vertical-align:-2px;margin-right:6px}
.mark.sq{fill:var(--sq);stroke:var(--sq)}
.mark.vq{fill:var(--vq);stroke:var(--vq);fill-opacity:.75}
.mark.none{fill:var(--none);stroke:var(--none)}
.mark.hollow{fill-opacity:0}
.key{list-style:none;display:flex;flex-wrap:wrap;gap:4px 24px;margin:0;padding:0;font-size:13px}
.key b{font-weight:600}
.heat{border-collapse:separate;border-spacing:2px;font-size:12.5px;width:100%}
.heat th{font-weight:400;color:var(--quiet);text-align:right;padding:0 8px 0 0;white-space:nowrap}
.heat tbody th{position:sticky;left:0;background:var(--page)}
.heat thead th{text-align:center;padding:0}
.heat thead td{text-align:right;padding:0 8px 0 0;color:var(--quiet)}
.heat tbody td{text-align:center;height:25px;min-width:38px;border-radius:3px;color:var(--low-text)}
.small{width:auto}
.small{font-size:12px}
.small tbody td{height:17px;min-width:13px;width:13px;padding:0}
.small thead th{overflow:visible;max-width:13px}
.heat tbody .no{background:repeating-linear-gradient(135deg,transparent 0 4px,var(--line) 4px 5px)}
.edge{box-shadow:inset 0 -3px var(--sq)}
.scale{display:flex;align-items:center;gap:2px;margin-top:10px;font-size:12.5px;color:var(--quiet)}
.scale i{width:20px;height:11px;border-radius:2px}
.scale span:first-child{margin-right:6px}.scale span:last-child{margin-left:6px}
.bars{list-style:none;margin:0;padding:0;font-size:14px}
.bars li{display:grid;grid-template-columns:92px 1fr 88px;align-items:center;gap:10px;padding:4px 0}
.bars i{height:14px;background:var(--strong);border-radius:3px;min-width:2px}
.bars .reused{visibility:hidden}
.bars b{font-weight:400;text-align:right;white-space:nowrap}
.stack{display:flex;height:26px;gap:2px;margin:4px 0 14px}
.stack i{flex-basis:0;min-width:2px;border-radius:3px}
"""

_PHONE = """
@media (max-width:760px){
main{padding:20px 16px 40px}
h1{font-size:25px}
section{margin-top:36px}
.two{grid-template-columns:1fr;gap:32px}
.cards{grid-template-columns:1fr 1fr;gap:10px}
.card{padding:12px 12px 10px}
.card dl{display:grid;grid-auto-flow:column;justify-content:start;gap:10px}
.card h2{font-size:11.5px}
.card dd{font-size:16.5px;letter-spacing:-.03em}
.rows th,.rows td{padding:7px 8px}
.quality{font-size:13px}
.quality .se{display:block;margin:0;font-size:11.5px}
.counted thead{display:none}
.counted tr{display:grid;grid-template-columns:1fr auto;border-bottom:1px solid var(--line);padding:8px 0}
.counted td,.counted th{border:0;padding:0!important}
.counted .what{grid-column:1/3}
.parts{font-size:13px}
.parts th,.parts td{padding:6px 5px}
.parts .swatch{margin-right:6px}
.plane{height:320px;margin-left:40px}
}
@media (max-width:350px){.cards{grid-template-columns:1fr}}
@media print{main{max-width:none}.scroll{overflow:visible}}
"""


def _shades() -> str:
    """Backgrounds of the heat maps; the last three steps carry the opposite text colour."""
    rules = [
        f".bits .h{step}{{background:var(--b{step})}}.error .h{step}{{background:var(--e{step})}}" for step in range(9)
    ]
    rules += [f".heat tbody .h{step}{{color:var(--high-text)}}" for step in (6, 7, 8)]
    parts = ("matrix", "lora", "elementwise", "keep", "emb", "head", "rest")
    rules += [f".part-{part}{{background:var(--p-{part})}}" for part in parts]
    return "\n".join(rules)


def style_sheet() -> str:
    """All rules, in the order in which they must stand."""
    return "".join((_COLOURS, _TEXT, _TABLES, _PICTURES, _shades(), _PHONE))
