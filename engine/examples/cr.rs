//! Dump and restore by hand, for developers.
use rcr_engine::image::{DirSink, DirSource};
use rcr_engine::{Tree, dump, freeze, restore};
fn main() -> Result<(), Box<dyn std::error::Error>> {
    tracing_subscriber::fmt::init();
    let a: Vec<String> = std::env::args().collect();
    match a[1].as_str() {
        "check" => {
            let t = Tree::Root(a[2].parse()?);
            for r in dump::check(&t, &dump::DumpOptions::default())? {
                println!("{r}");
            }
            println!(
                "{} bytes",
                dump::estimate_bytes(&t, &dump::DumpOptions::default())?
            );
        }
        "dump" => {
            let t = Tree::Root(a[2].parse()?);
            let mut sink = DirSink::create(&a[3])?;
            let frozen = freeze::freeze(&t)?;
            let s = dump::dump(&frozen, &mut sink, &dump::DumpOptions::default());
            match s {
                Ok(s) => {
                    println!("{s:?}");
                    if a.get(4).is_none() {
                        frozen.kill()
                    }
                }
                Err(e) => {
                    let mut e: Option<&dyn std::error::Error> = Some(&e);
                    while let Some(x) = e {
                        eprintln!("{x}");
                        e = x.source();
                    }
                    std::process::exit(1)
                }
            }
        }
        _ => {
            let source = DirSource::open(a[2].as_ref())?;
            let r = restore::restore(
                &source,
                &restore::RestoreOptions {
                    journal_interim: Some("/tmp/interim".into()),
                    ..Default::default()
                },
            );
            match r {
                Ok(r) => {
                    println!("{:?}", r.pids());
                    r.resume()?
                }
                Err(e) => {
                    let mut e: Option<&dyn std::error::Error> = Some(&e);
                    while let Some(x) = e {
                        eprintln!("{x}");
                        e = x.source();
                    }
                    std::process::exit(1)
                }
            }
        }
    }
    Ok(())
}
