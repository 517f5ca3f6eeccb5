"""The style sheet of the report, for screen, dark screen, phone and paper."""

from __future__ import annotations

STYLE = """
:root{color-scheme:light dark;--paper:#fff;--wash:#f5f6f8;--ink:#15191f;--mute:#58626f;--line:#d9dde3;--grid:#e6e9ed;
--accent:#005f96;--tint:#eaf3f9;--c1:#0072b2;--c2:#d55e00;--c3:#009e73;--c4:#b4568c;--good:#00694a;--bad:#a83200;--shade:#0000001f}
@media screen and (prefers-color-scheme:dark){:root{--paper:#14171b;--wash:#1c2126;--ink:#e8eaed;--mute:#a0aab5;
--line:#363d45;--grid:#2a3037;--accent:#7cc4f0;--tint:#16293a;--c1:#56b4e9;--c2:#f08a4b;--c3:#35c79d;--c4:#e29bc4;
--good:#5fd6ae;--bad:#ff9a6b;--shade:#0009}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-padding-top:1rem}
body{margin:0;background:var(--paper);color:var(--ink);counter-reset:figure table;
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue","Liberation Sans",Arial,sans-serif}
header,main,footer{max-width:1144px;margin:0 auto;padding:0 20px}
header{padding-top:40px}
h1{font-size:clamp(1.7rem,4.5vw,2.5rem);line-height:1.15;letter-spacing:-.02em;margin:0 0 .5rem;overflow-wrap:anywhere}
h2{font-size:1.5rem;line-height:1.2;letter-spacing:-.01em;margin:0 0 .6rem}
h3{font-size:1.05rem;margin:2rem 0 .4rem}
p{margin:.4rem 0 .8rem;max-width:72ch}
a{color:var(--accent)}
section{padding:32px 0 0;margin-top:28px;border-top:1px solid var(--line)}
.brand{margin:0 0 .3rem;color:var(--accent);font-weight:650;letter-spacing:.01em}
.lead{font-size:1.15rem;max-width:64ch}
.mute,figcaption,caption{color:var(--mute)}
nav{margin:1.4rem 0 0;display:flex;flex-wrap:wrap;gap:.2rem 1.2rem}
code{font:.88em ui-monospace,"SF Mono",Menlo,Consolas,"Liberation Mono",monospace;overflow-wrap:anywhere}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(190px,1fr));gap:12px;margin:1.6rem 0 0;padding:0}
.card{background:var(--wash);border-radius:10px;padding:14px 16px 13px}
.card dt{font-size:.88rem;color:var(--mute)}
.card .big{font-size:1.8rem;font-weight:680;letter-spacing:-.02em;line-height:1.25;font-variant-numeric:tabular-nums}
.card .big small{font-size:1rem;font-weight:500;letter-spacing:0;margin-left:.25em}
.card dd{margin:0}.card .why{font-size:.86rem;line-height:1.4;color:var(--mute)}
figure{margin:1.4rem 0 2rem;break-inside:avoid}
figcaption,caption{font-size:.9rem;line-height:1.5;text-align:left}
figcaption{max-width:80ch;margin-top:.7rem}
figcaption::before{counter-increment:figure;content:"Figure " counter(figure) ". ";
font-weight:650;color:var(--ink)}
caption>span::before{counter-increment:table;content:"Table " counter(table) ". ";font-weight:650;color:var(--ink)}
caption{padding:0 0 .55rem}caption>span{display:block;max-width:100ch}
.panels{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:20px 40px;align-items:start}
.panels>*{max-width:620px}
h4{font-size:.95rem;margin:0 0 .6rem}
svg{display:block;width:100%;height:auto;overflow:visible;font-size:11px;fill:var(--ink)}
.tick,.label,.site .mute{fill:var(--mute)}.tick,.note{font-size:10px;font-variant-numeric:tabular-nums}
.site{font-size:10px}.note,.strong{font-weight:650}.note{font-size:9px}
.halo{paint-order:stroke;stroke:var(--paper);stroke-width:3px;stroke-linejoin:round}
.grid{stroke:var(--grid)}.axis{stroke:var(--mute)}
.marker{stroke:var(--mute);stroke-dasharray:2 3}.best{fill:var(--paper);stroke:var(--c1);stroke-width:2.5}
.curve{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.l1{stroke:var(--c1)}.l2{stroke:var(--c2);stroke-dasharray:5 4}.dot{stroke:none}
.dot.l1{fill:var(--c1)}.dot.l2{fill:var(--c2)}
.s1{fill:var(--c1)}.s2{fill:var(--c2)}.s3{fill:var(--c3)}.s4{fill:var(--c4)}.s0{fill:var(--mute);fill-opacity:.55}
.simulated{fill:var(--c1);fill-opacity:.16;stroke:var(--c1);stroke-dasharray:3 2}
.whisker{stroke:var(--ink);stroke-width:1.4}.under{stroke:var(--paper);stroke-width:4}
.hover{fill:transparent}.hover:hover{fill:var(--mute);fill-opacity:.14}
.legend{display:flex;flex-wrap:wrap;gap:.3rem 1.3rem;margin:0 0 .9rem;padding:0;list-style:none;font-size:.9rem}
.legend li{display:flex;align-items:center;gap:.45rem}
.swatch{width:24px;height:12px;flex:none}
.scroll{overflow-x:auto;margin:1.2rem 0 1.6rem;background:
linear-gradient(90deg,var(--paper) 16px,transparent) left/48px 100% no-repeat local,
linear-gradient(270deg,var(--paper) 16px,transparent) right/48px 100% no-repeat local,
linear-gradient(90deg,var(--shade),transparent) left/14px 100% no-repeat scroll,
linear-gradient(270deg,var(--shade),transparent) right/14px 100% no-repeat scroll}
.scroll:focus-visible{outline:2px solid var(--accent);outline-offset:4px}
table{border-collapse:collapse;font-size:.92rem;line-height:1.35;font-variant-numeric:tabular-nums}
table.wide{width:100%}
th,td{padding:.5rem .7rem;text-align:left;vertical-align:top;border-bottom:1px solid var(--line);font-weight:400}
thead th{vertical-align:bottom;font-size:.84rem;font-weight:600;color:var(--mute);border-bottom:1.5px solid var(--mute)}
th:first-child,td:first-child{padding-left:.3rem}
tbody th{min-width:8.5rem}
.r{text-align:right}td.r{white-space:nowrap}
tr.pick>*{background:var(--tint);font-weight:600}
.badge{display:inline-block;font-size:.78rem;font-weight:500;line-height:1.3;padding:.05rem .4rem;
border:1px dashed var(--mute);border-radius:4px;color:var(--mute);white-space:nowrap}
.state{display:inline-flex;align-items:baseline;gap:.4rem;font-weight:600;white-space:nowrap}
.state svg{width:15px;height:15px;flex:none;align-self:center}
.yes{color:var(--good)}.no{color:var(--bad)}.open{color:var(--mute)}
.state svg{fill:none;stroke:currentColor;stroke-width:2;stroke-linecap:round;stroke-linejoin:round}
.verdict{font-size:1.1rem}
.panels .scroll{margin:0}.bits{font-size:.84rem;border-collapse:separate;border-spacing:3px}
.bits th,.bits td{border:0;padding:0;text-align:center;vertical-align:middle}
.bits tbody th{text-align:right;padding-right:.5rem;min-width:0;white-space:nowrap;font-weight:400}
.bits thead th{padding:0 .2rem;border:0}.bits thead th.span{border-bottom:1px solid var(--line)}
.pair{display:inline-flex;border-radius:4px;overflow:hidden}
.bit{width:1.35rem;line-height:1.45rem;text-align:center;font-weight:600;display:inline-block}
.many .bit{width:1.05rem}.bit+.bit{border-left:1px solid var(--paper)}.legend .bit{border-radius:4px}
.b2{background:#fff3b8;color:#222}.b3{background:#fbd88a;color:#222}.b4{background:#f3b04e;color:#222}
.b5{background:#9fcbd8;color:#222}.b6{background:#5fa3c4;color:#111}.b7{background:#2c6da0;color:#fff}
.b8{background:#173f74;color:#fff}
.float{background:transparent;color:var(--mute);box-shadow:inset 0 0 0 1px var(--line)}
.maps{display:grid;grid-template-columns:repeat(var(--wide),minmax(0,140px));gap:12px;margin:0 0 1.7rem}
.map{margin:0;font-size:.78rem;line-height:1.3;color:var(--mute);text-align:center;overflow-wrap:anywhere}
.map img{display:block;width:100%;height:auto;image-rendering:pixelated;border-radius:4px;margin-bottom:.3rem}
.map b{color:var(--ink)}
.shots{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,300px),1fr));gap:20px;margin:0 0 1rem}
.shot{margin:0;font-size:.84rem;line-height:1.4;color:var(--mute);overflow-wrap:anywhere;break-inside:avoid}
.shot img{display:block;width:100%;height:auto;border-radius:6px;margin-bottom:.4rem}.shot b{color:var(--ink)}
.ramp{display:flex;align-items:center;gap:.6rem;font-size:.84rem;color:var(--mute);font-variant-numeric:tabular-nums}
.ramp img{width:160px;height:12px;border-radius:3px}
.facts{display:grid;grid-template-columns:minmax(8.5rem,max-content) minmax(0,1fr);
gap:.4rem 1.4rem;margin:1rem 0 1.4rem}
.facts dt{color:var(--mute)}.facts dd{margin:0;overflow-wrap:anywhere}
.chips{display:flex;flex-wrap:wrap;gap:.3rem;margin:0;padding:0;list-style:none}
.chips li{background:var(--wash);border-radius:5px;padding:.05rem .5rem;font-size:.9rem}
details{margin:.6rem 0 1rem}summary{cursor:pointer;color:var(--accent)}
summary:focus-visible,a:focus-visible{outline:2px solid var(--accent);outline-offset:3px;border-radius:2px}
footer{margin-top:40px;padding-top:18px;padding-bottom:48px;color:var(--mute);font-size:.88rem}
@media(max-width:640px){header{padding-top:26px}.cards{grid-template-columns:repeat(2,minmax(0,1fr))}
.card{padding:11px 12px}.card .big{font-size:1.45rem}.maps{grid-template-columns:repeat(var(--narrow),minmax(0,1fr))}
.facts{grid-template-columns:1fr;gap:0}.facts dd{margin-bottom:.6rem}.legend{gap:.2rem 1rem}
.bit,.many .bit{width:.95rem}.bits{border-spacing:2px}
caption>span{max-width:calc(100vw - 44px)}table.wide{min-width:600px}thead th{white-space:nowrap}
.wide tbody th{position:sticky;left:0;background:var(--paper)}.wide .pick th{background:var(--tint)}
svg{font-size:12px}.tick{font-size:11px}.site{font-size:10.5px}}
@media print{@page{margin:13mm}html{font-size:72%}body{font-size:1rem}
header,main,footer{max-width:none;padding-left:0;padding-right:0}header{padding-top:0}nav,details{display:none}
section{padding-top:18px;margin-top:18px}h2,h3,h4,caption{break-after:avoid}tr,.card,.maps{break-inside:avoid}
.cards{grid-template-columns:repeat(5,1fr)}.panels{grid-template-columns:1fr 1fr}
.scroll{overflow:visible;background:none}th,td{padding:.35rem .4rem}.wide tbody th{min-width:0}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""
