"""The page's style sheet. Colours are variables, the charts' among them; dark is another set of them."""

# ruff: noqa: E501 (rules of one line each)

STYLE = """
:root{--paper:#fffefb;--ink:#1b1b1a;--muted:#6b6963;--grid:#dedbd3;--demo:#1d5fa6;--other:#8b8880;
--band:#cfdff0;--card:#f6f4ee;--holds:#1c6b3c;--fails:#a82a1f;--open:#7d5600;--waits:#5d5b56;--given:#5d5b56;
--serif:"Iowan Old Style","Palatino Linotype",Palatino,"Source Serif 4",Georgia,"Liberation Serif",serif;
--sans:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue","Liberation Sans",Arial,sans-serif;
--mono:ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace}
@media (prefers-color-scheme:dark){:root{--paper:#161614;--ink:#ecebe6;--muted:#a6a39b;--grid:#383631;
--demo:#84b8f2;--other:#8d8a82;--band:#22374e;--card:#201f1c;--holds:#7bcb97;--fails:#f29186;--open:#e2b862;
--waits:#b3b0a8;--given:#b3b0a8}}
*{box-sizing:border-box}
html{scroll-behavior:smooth;-webkit-text-size-adjust:100%}
#in-en+label{margin-left:max(24px,calc(50vw - 536px))}
body{margin:0;background:var(--paper);color:var(--ink);font:17px/1.55 var(--sans)}
main{max-width:1120px;margin:0 auto;padding:0 24px 96px}
input[name=language]{position:absolute;opacity:0}
input[name=language]+label{display:inline-block;margin:20px 22px 0 0;color:var(--muted);font-size:14px;
cursor:pointer;border-bottom:2px solid transparent}
input[name=language]:checked+label{color:var(--ink);border-color:var(--ink)}
input[name=language]:focus-visible+label{outline:2px solid var(--demo);outline-offset:3px}
#in-en:checked~main article[lang=fr],#in-fr:checked~main article[lang=en]{display:none}
h1,h2,h3.prompt,.quote,.deck{font-family:var(--serif);font-weight:500;text-wrap:balance}
h1{font-size:clamp(1.8rem,4.6vw,3.3rem);line-height:1.12;letter-spacing:-.015em;margin:.2em 0 .5em;max-width:21em}
h2{font-size:clamp(1.5rem,3vw,2.1rem);line-height:1.2;margin:0 0 .3em}
h3{font-size:1.05rem;line-height:1.3;margin:0 0 .6em}
h4{font-size:.85rem;margin:0 0 .5em;color:var(--muted);font-weight:600}
.kicker{color:var(--muted);font-size:.85rem;letter-spacing:.06em;text-transform:uppercase;margin:40px 0 0}
.deck{font-size:clamp(1.1rem,2vw,1.35rem);line-height:1.45;color:var(--ink);max-width:42em;margin:0 0 1.6em}
.lead{max-width:44em;margin:0 0 1.6em;color:var(--muted)}
.fine,figcaption{font-size:.85rem;line-height:1.5;color:var(--muted);max-width:62em}
section{border-top:1px solid var(--ink);padding-top:20px;margin-top:72px}
nav{font-size:.9rem;display:flex;flex-wrap:wrap;gap:6px 22px;margin-top:28px}
a{color:inherit;text-decoration-color:var(--other);text-underline-offset:3px}
a:focus-visible,.scroll:focus-visible{outline:2px solid var(--demo);outline-offset:2px}
ul{padding:0;margin:0;list-style:none}
ul.fine li{margin:.2em 0}
code{font-family:var(--mono);font-size:.82em}
.bar{display:flex;gap:3px;margin:0}
.bar li{border-top:6px solid;padding:8px 10px 0 0;flex-basis:5.2rem;font-size:.8rem;line-height:1.35}
.bar b{display:block;font:500 1.7rem/1.1 var(--serif)}
.bar span{color:var(--muted)}
.holds{color:var(--holds)}.fails{color:var(--fails)}.open{color:var(--open)}
.waits{color:var(--waits)}.given{color:var(--given)}
.bar .waits,.bar .given{border-top-style:dotted}
.chip{display:inline-block;font-size:.8rem;font-weight:600;line-height:1.3;white-space:normal}
.chip>span{display:inline-block;min-width:1em}
.known{color:var(--muted);font-size:.8rem}
.v{position:relative;text-decoration:none;border-bottom:1px dotted var(--other);font-variant-numeric:tabular-nums}
.ci{color:var(--muted);white-space:nowrap}
table.models .ci{display:block;font-size:.85em}
.tip{display:none;position:fixed;z-index:9;left:50%;bottom:20px;transform:translateX(-50%);
width:min(46rem,calc(100vw - 32px));padding:12px 16px;background:var(--ink);color:var(--paper);
font:400 .85rem/1.45 var(--sans);border-radius:4px;white-space:normal;text-align:left;overflow-wrap:anywhere}
.tip b{display:block;font-family:var(--mono)}
.v:hover .tip,.v:focus .tip{display:block}
table{border-collapse:collapse;width:100%;font-size:.9rem}
caption{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
th,td{text-align:left;vertical-align:top;padding:9px 16px 9px 0;border-bottom:1px solid var(--grid)}
thead th{font-size:.8rem;color:var(--muted);font-weight:500;vertical-align:bottom;border-color:var(--ink)}
tbody th{font-weight:500}
.scroll{overflow-x:auto;margin:0 0 1.2em}
.scroll.sources{max-height:36rem;overflow:auto;border-bottom:1px solid var(--ink)}
.scroll.sources thead th{position:sticky;top:0;background:var(--paper)}
table.note{table-layout:fixed}
table.note th:first-child{width:19%}
table.note td,table.note tbody th{padding-top:16px;padding-bottom:16px}
table.note thead th{font-size:.95rem;color:var(--ink);font-weight:600}
.quote{display:block;font-size:1.75rem;line-height:1.1;margin-bottom:8px;font-variant-numeric:lining-nums}
table.note li{margin:0 0 3px;line-height:1.35}
table.note .chip{margin-top:8px}
table.models{min-width:1000px}
table.models td{font-variant-numeric:tabular-nums}
table.models td:nth-child(5){min-width:9.5rem}
table.models th{white-space:nowrap}table.models thead th{white-space:normal}
table.models tbody tr:first-child th{color:var(--demo)}
table.claims{min-width:860px}
table.claims th:first-child{width:4rem}
table.claims td:nth-child(2){width:24%;font-family:var(--serif);font-size:1rem}
table.claims td:nth-child(3){width:15%;font-variant-numeric:tabular-nums}
table.claims td:nth-child(4){width:14%}
table.claims p{margin:0 0 4px}
table.claims code{color:var(--muted);overflow-wrap:anywhere}
table.sources{min-width:1000px;font-size:.8rem}
table.sources td:nth-child(4){width:28%}
table.sources td:nth-child(5){width:20%}
table.sources td:last-child{width:7rem}
table.sources code:target{background:var(--band)}
table.sources abbr,table.plain abbr{font-family:var(--mono);font-size:.95em;text-decoration:none}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(440px,100%),1fr));gap:48px 56px;margin:0 0 56px}
figure{margin:0}
figure h3{margin-bottom:10px}
svg{display:block;width:100%;height:auto;font-family:var(--sans)}
figcaption{margin-top:8px}
.prompt{font-size:1.35rem;margin:1.6em 0 .7em}
.side{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(320px,100%),1fr));gap:24px 40px}
.side>div{background:var(--card);padding:16px 18px;border-radius:4px;min-width:0}
dl{margin:0}
.side dt{font-size:.8rem;color:var(--muted)}
.side dd{margin:0 0 12px}
pre{margin:2px 0 0;font:.85rem/1.45 var(--mono);white-space:pre-wrap;overflow-wrap:anywhere}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(240px,100%),1fr));gap:18px 32px;margin-bottom:32px}
.facts dt{font-size:.8rem;color:var(--muted)}
.facts dt::first-letter{text-transform:uppercase}
.facts dd{margin:0;font-variant-numeric:tabular-nums}
footer{margin-top:56px;color:var(--muted);font-size:.85rem}
@media (max-width:700px){
body{font-size:16px}main{padding:0 18px 72px}#in-en+label{margin-left:18px}
section{margin-top:52px}.kicker{margin-top:28px}
.bar{flex-direction:column;gap:10px}.bar li{flex:none!important;border-top:0;border-left:6px solid;padding:0 0 0 12px}
.bar .waits,.bar .given{border-left-style:dotted}.bar b{display:inline;font-size:1.3rem}
:is(table.note,table.claims),:is(table.note,table.claims) :is(tbody,tr,td,tbody th){display:block;width:auto!important;min-width:0}
:is(table.note,table.claims) thead{display:none}
table.note tbody th{font-family:var(--serif);font-size:1.25rem;border:0;padding:26px 0 0}
table.note td{padding:14px 0}
table.note td::before{content:attr(data-label);display:block;font-size:.8rem;color:var(--muted);margin-bottom:2px}
table.claims tr{border-bottom:1px solid var(--grid);padding:14px 0}
table.claims :is(td,tbody th){border:0;padding:1px 0}
table.claims tbody th,table.claims td:nth-child(3){color:var(--muted);font-size:.85rem}
table.claims td:nth-child(2){font-size:1.15rem;line-height:1.3}
table.claims td:nth-child(3)::before{content:attr(data-label) " "}
table.plain{min-width:640px}
}
@media (prefers-reduced-motion:reduce){html{scroll-behavior:auto}}
@media print{
:root{--paper:#fff;--ink:#000;--muted:#444;--grid:#bbb;--demo:#1d5fa6;--other:#777;--band:#dfe9f4;--card:#fff;
--holds:#1c6b3c;--fails:#a82a1f;--open:#7d5600;--waits:#444;--given:#444}
body{font-size:10pt}nav,.tip,input[name=language]+label{display:none!important}
main{max-width:none;padding:0}h1{font-size:22pt}
.scroll,.scroll.sources{overflow:visible;max-height:none}
table.claims,table.sources,table.models{min-width:0}table.sources{font-size:6.5pt}
table.sources td,table.sources th{padding-right:6px;overflow-wrap:anywhere}
section{margin-top:24pt}figure,tr,.side>div{break-inside:avoid}.figures{grid-template-columns:1fr 1fr}
a.v{border:0}
}
"""
