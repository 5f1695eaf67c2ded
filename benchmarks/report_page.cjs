// Opens pages of `qinvert report` in Chromium at three widths, light and dark, and looks for console errors,
// requests, horizontal overflow and findings of axe.  It ends with 1 where there is any.
// npm install playwright-core axe-core
// CHROMIUM=/usr/bin/chromium node benchmarks/report_page.cjs /full/path/report.html   (SHOTS=1 writes PNG files)
const { chromium } = require('playwright-core');
const fs = require('fs');
const axe = fs.readFileSync(require.resolve('axe-core/axe.min.js'), 'utf8');
(async()=>{
 const b=await chromium.launch({executablePath: process.env.CHROMIUM || '/usr/bin/chromium',args:['--no-sandbox','--disable-gpu','--disable-quic','--no-first-run','--disable-background-networking','--disable-component-update','--disable-sync']});
 const shots=process.env.SHOTS; let bad=0;
 for(const f of process.argv.slice(2)) for(const scheme of ['light','dark']) for(const w of [360,800,1400]){
  const c=await b.newContext({viewport:{width:w,height:900},colorScheme:scheme});const p=await c.newPage();
  const errs=[];p.on('console',m=>{if(['error','warning'].includes(m.type()))errs.push(m.text())});p.on('pageerror',e=>errs.push(String(e)));p.on('request',r=>{if(!/^(file|data):/.test(r.url()))errs.push('network '+r.url())});
  await p.goto('file://'+f);
  const over=await p.evaluate(()=>document.documentElement.scrollWidth-window.innerWidth);
  let serious=[];
  for (const open of [false,true]){ if(open) await p.evaluate(()=>document.querySelectorAll('details').forEach(d=>d.open=true));
   await p.evaluate(axe); const r=await p.evaluate(()=>axe.run());
   serious=serious.concat(r.violations.map(v=>v.id+'('+v.impact+','+v.nodes.length+') '+v.nodes[0].html.slice(0,120)+' '+(v.nodes[0].any[0]||{}).message));}
  const over2=await p.evaluate(()=>document.documentElement.scrollWidth-window.innerWidth);
  if(errs.length||over>0||over2>0||serious.length){bad++;console.log(f,scheme,w,'errors',errs,'overflow',over,over2,serious)}
  if(shots){await p.evaluate(()=>document.querySelectorAll('details').forEach(d=>d.open=false));await p.screenshot({path:f.replace('.html',`-${scheme}-${w}.png`),fullPage:true});}
  await c.close();}
 await b.close(); console.log('faults', bad);
 process.exit(bad ? 1 : 0);
})();
