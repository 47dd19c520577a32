"""Style sheet of the reports, light and dark, without any outside font or image."""

from __future__ import annotations

STYLE = """
:root{color-scheme:light dark;--page:#fbfaf8;--sheet:#fff;--ink:#1d1c1a;--quiet:#66625b;--line:#e3dfd8;--accent:#0b6e63;
--fill:#5aa398;--tick:#b3371f;--warn:#fdf3d8;--warn-line:#c99a1c}
@media(prefers-color-scheme:dark){:root{--page:#161716;--sheet:#1f2120;--ink:#ecebe7;--quiet:#a5a29a;--line:#353734;
--accent:#6fcabd;--fill:#3a8a7e;--tick:#ff9877;--warn:#332b14;--warn-line:#b98f1f}}
*{box-sizing:border-box}
html{font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif;-webkit-text-size-adjust:100%}
body{margin:0 auto;max-width:84rem;padding:2.5rem clamp(1rem,4vw,3rem);background:var(--page);color:var(--ink);
overflow-wrap:anywhere}
h1,h2,h3,p,dl,dd,ol,ul{margin:0;padding:0}
h1{font-size:clamp(1.6rem,3vw,2.2rem);line-height:1.2;letter-spacing:-.02em;text-wrap:balance}
h2{font-size:1.25rem;line-height:1.3;letter-spacing:-.01em}
h3{font-size:.95rem;margin:0 0 .75rem}
a{color:var(--accent);text-underline-offset:.15em}
img{display:block;max-width:100%;height:auto;border-radius:3px}
.pixels{image-rendering:pixelated}
.lead{margin:.5rem 0 1.25rem;color:var(--quiet);max-width:60rem}
.quiet,.kicker,.id,.p,.cards i,th,dt{color:var(--quiet)}
.id{font:.75rem/1.4 ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace}
.notes{list-style:none;margin:0 0 1.25rem;display:grid;gap:.5rem}
.notes li{background:var(--warn);border-left:3px solid var(--warn-line);padding:.5rem .8rem;border-radius:0 4px 4px 0;
font-size:.9rem}
.facts{font-size:.85rem;font-variant-numeric:tabular-nums;border-top:1px solid var(--line)}
.facts div{display:flex;justify-content:space-between;gap:1rem;padding:.35rem 0;border-bottom:1px solid var(--line)}
.facts dt{flex:none;max-width:60%}
.facts dd{text-align:right}
.wide{display:grid;grid-template-columns:repeat(auto-fit,minmax(16rem,1fr));column-gap:2rem}
nav ol{display:flex;flex-wrap:wrap;gap:.6rem;list-style:none;margin-top:1.5rem}
nav a{display:flex;align-items:center;gap:.6rem;max-width:18rem;padding:.4rem .8rem .4rem .4rem;background:var(--sheet);
border:1px solid var(--line);border-radius:6px;color:inherit;text-decoration:none;font-size:.85rem;line-height:1.3}
nav a:hover,nav a:focus-visible{border-color:var(--accent)}
nav a span,.caption{display:-webkit-box;-webkit-box-orient:vertical;-webkit-line-clamp:3;overflow:hidden}
section{display:grid;grid-template-columns:18rem minmax(0,1fr);gap:2.5rem;padding:2.5rem 0;margin-top:2rem;
border-top:1px solid var(--line)}
section>div{min-width:0}
.frame{display:grid;place-items:center;padding:1rem;background:var(--sheet);border:1px solid var(--line);
border-radius:8px}
.kicker{margin-top:1rem;font-size:.8rem}
.query .id{margin:.35rem 0 1rem}
.cards{list-style:none;display:grid;grid-template-columns:repeat(auto-fill,minmax(10.5rem,1fr));gap:1rem;
margin-bottom:2.25rem}
.cards li{display:flex;flex-direction:column;gap:.25rem;padding:.6rem;background:var(--sheet);
border:1px solid var(--line);border-radius:8px;font-size:.85rem;line-height:1.4;overflow:hidden;break-inside:avoid}
.cards .frame{border:0;padding:.4rem;min-height:144px}
.numbers{display:flex;justify-content:space-between;align-items:baseline;font-variant-numeric:tabular-nums}
.rank{font-size:1.15rem;line-height:1}
.rank::before{content:"#";color:var(--quiet);font-weight:400}
.score{font-weight:600}
.p{text-align:right;font-size:.8rem;font-variant-numeric:tabular-nums}
.caption{font-weight:500}
.groups{display:flex;flex-wrap:wrap;gap:0 .75rem;font-size:.8rem}
.cards i{font-style:normal}
.license{margin-top:auto;padding-top:.35rem;border-top:1px solid var(--line);font-size:.75rem}
.row{display:grid;grid-template-columns:11rem minmax(0,1fr);gap:1rem;align-items:center;padding:.5rem 0;
border-bottom:1px solid var(--line)}
.row ol{display:flex;flex-wrap:wrap;gap:.4rem;list-style:none}
h3~.row{font-size:.85rem}
.row+h3{margin-top:2.25rem}
.columns{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,28rem),1fr));gap:1.5rem 2.5rem}
.scroll{overflow-x:auto}
.scroll .quiet{margin-top:.35rem;font-size:.8rem}
.shares{width:100%;border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums}
.shares th,.shares td{padding:.35rem 0 .35rem .9rem;text-align:right;font-weight:400;white-space:nowrap}
.shares th:first-child{padding-left:0;text-align:left;white-space:normal;min-width:6rem;max-width:12rem}
.shares tbody th{color:var(--ink)}
.shares .drawn{width:100%;min-width:7rem}
.axis{display:flex;justify-content:space-between}
.bar{position:relative;height:1rem;border-left:1px solid var(--quiet)}
.bar span{position:absolute;top:0;height:100%}
.bar .fill{left:0;background:var(--fill);border-radius:0 2px 2px 0}
.bar .whisker{top:25%;height:50%;border:solid var(--ink);border-width:0 1.5px;
background:linear-gradient(var(--ink),var(--ink)) center/100% 1.5px no-repeat}
.bar .tick{top:-15%;height:130%;width:2px;margin-left:-1px;background:var(--tick)}
footer{border-top:1px solid var(--line);padding-top:2rem;font-size:.9rem}
footer p,footer dl{max-width:60rem;margin-top:1rem}
footer dl div{display:grid;grid-template-columns:11rem 1fr;padding:.4rem 0}
@media(min-width:52.01rem) and (min-height:48rem){.query{position:sticky;top:1.5rem;align-self:start}}
@media(max-width:52rem){section{grid-template-columns:minmax(0,1fr);gap:1.5rem}footer dl div{grid-template-columns:1fr}
.cards{grid-template-columns:repeat(auto-fill,minmax(9.5rem,1fr))}}
@media print{body{max-width:none;padding:0}nav{display:none}}
"""
