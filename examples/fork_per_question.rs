//! A template with a large context, and a session of it per question:
//! `cargo run --release --example fork_per_question`.
//!
//! The context is read, parsed and indexed once. Each child starts with all of that and shares its
//! memory, whatever its size; what one child does no other sees.

use std::time::Instant;

use kaa::{Context, Environment, EnvironmentExt, EnvironmentOptions, Runtime, Store};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let cache = dirs::cache_dir().ok_or("there is no cache directory: set HOME")?;
    let runtime = Runtime::open(Store::open(cache.join("kaa"))?)?;
    let image = runtime.image("base", &|_| {})?;

    let started = Instant::now();
    let mut text = String::new();
    for n in 0..400_000 {
        text.push_str(&format!("order {n}: customer {} paid {}\n", n % 997, n * 7 % 500));
    }
    let size = text.len();
    let mut template = runtime.environment(&image, EnvironmentOptions::default())?;
    template.add_context(Context::Text(text.into_bytes()), None).await?;
    let prepare = "lines = context.count('\\n')\ndef find(n):\n    at = context.index(f'order {n}:')\n    return context[at:context.index('\\n', at)]";
    template.execute(prepare).await?;
    let snapshot = template.snapshot().await?;
    let image = runtime.template(&snapshot)?;
    println!("a template of {:.1} MB in {:.0?}", size as f64 / 1e6, started.elapsed());

    let mut children = tokio::task::JoinSet::new();
    let runtime = std::sync::Arc::new(runtime);
    for question in 0..20 {
        let (runtime, image) = (runtime.clone(), image.clone());
        children.spawn(async move {
            let started = Instant::now();
            let mut child = runtime.environment(&image, EnvironmentOptions::default())?;
            let code = format!("lines = None\nprint(find({}))", question * 1000);
            let cell = child.execute(&code).await?;
            Ok::<_, kaa::Error>((cell.stdout.text().into_owned(), started.elapsed()))
        });
    }
    let mut answers = Vec::new();
    while let Some(child) = children.join_next().await {
        let (answer, time) = child??;
        println!("{} ({time:.1?})", answer.trim());
        answers.push(answer);
    }
    assert_eq!(answers.len(), 20);
    assert!(answers.contains(&"order 19000: customer 57 paid 0\n".to_owned()), "{answers:?}");
    let lines = template.execute("lines").await?.value;
    assert_eq!(lines.as_deref(), Some("400000"), "no child touches its template");
    Ok(())
}

#[test]
fn runs() {
    main().unwrap();
}
