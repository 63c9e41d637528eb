//! How `cargo bench` prints and keeps its rows.

#![allow(clippy::unwrap_used, reason = "helpers of tests panic as tests do")]

#[path = "../benches/report.rs"]
mod report;

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, UNIX_EPOCH};

use pixmim::ops::cost::{Cost, Peaks};
use report::{COLUMNS, Report, Row, digits, stamp};

const PEAKS: Peaks = Peaks { bytes_per_second: 1e10, flops_per_second: 1e12 };

fn row(op: &str, took_ms: u64, cost: Option<Cost>) -> (Row, Peaks) {
    let row = Row {
        op: op.into(),
        direction: "forward".into(),
        shape: "vit_b <encoder>".into(),
        batch: 7,
        precision: "f32",
        took: Duration::from_millis(took_ms),
        images_per_second: cost.is_none().then_some(1400.0),
        cost,
    };
    (row, PEAKS)
}

fn report() -> Report {
    let rows = vec![
        // 10 ms at the roof of memory, 5 ms at that of products; taken 40 ms.
        row("layer_norm", 40, Some(Cost { bytes: 100_000_000, flops: 5_000_000_000 })),
        // 10 ms and 30 ms.
        row("linear", 40, Some(Cost { bytes: 100_000_000, flops: 30_000_000_000 })),
        // From a cache: five times the memory's speed.
        row("gelu", 2, Some(Cost { bytes: 100_000_000, flops: 0 })),
        row("data", 5, None),
    ];
    Report { environment: vec![("device", "a & b".into())], rows }
}

#[test]
fn a_record_has_rates_and_the_share_of_the_nearer_roof() {
    let record = report().record();
    let lines: Vec<_> = record.lines().collect();
    let start = |op: &str| format!("{op},forward,vit_b <encoder>,7,f32,");
    assert_eq!(lines[0], "# device: a & b");
    assert_eq!(lines[1], COLUMNS);
    assert_eq!(lines[2], start("layer_norm") + "40.00,,2.500,0.1250,memory,0.2500");
    assert_eq!(lines[3], start("linear") + "40.00,,2.500,0.7500,compute,0.7500");
    assert_eq!(lines[4], start("gelu") + "2.000,,50.00,,memory,5.0000");
    assert_eq!(lines[5], start("data") + "5.000,1400,,,,");
    let columns = |line: &&str| line.split(',').count();
    assert!(lines[1..].iter().all(|line| columns(line) == columns(&COLUMNS)), "{record}");
}

#[test]
fn the_table_says_which_roof() {
    let table = report().table();
    let line = |op: &str| table.lines().find(|line| line.starts_with(op)).unwrap();
    assert!(line("layer_norm").ends_with("25.0 % memory"), "{table}");
    assert!(line("linear").ends_with("75.0 % compute"), "{table}");
    assert!(line("data").ends_with("1400"), "{table}");
}

#[test]
fn bars_are_as_long_as_shares_and_end_within_the_chart() {
    let chart = report().chart();
    let widths: Vec<f64> = chart
        .split("<rect ")
        .skip(1)
        .map(|rect| rect.split("width=\"").nth(1).unwrap().split('"').next().unwrap())
        .map(|width| width.parse().unwrap())
        .collect();
    // A quarter, three quarters, and the longest bar there is. The data path has none.
    assert_eq!(widths, [100.0, 300.0, 480.0]);
    assert!(chart.contains("device a &amp; b") && chart.contains("vit_b &lt;encoder&gt;"));
    assert!(!chart.contains("<encoder>"), "text must be escaped");
}

#[test]
fn a_run_leaves_a_record_and_a_chart() {
    let folder = tempfile::tempdir().unwrap();
    let paths = report().write(&folder.path().join("bench")).unwrap();
    let texts = paths.each_ref().map(|path| fs::read_to_string(path).unwrap());
    assert_eq!(texts, [report().record(), report().chart()]);
    assert!(paths[0].extension().unwrap() == "csv" && paths[1].extension().unwrap() == "svg");
}

#[test]
fn four_digits_count() {
    let cases =
        [(123_456.0, "123456"), (98.76543, "98.77"), (0.5, "0.5000"), (0.00123456, "0.001235")];
    for (value, text) in cases {
        assert_eq!(digits(value), text);
    }
}

#[test]
fn stamps_know_leap_years() {
    let at = |seconds| stamp(UNIX_EPOCH + Duration::from_secs(seconds));
    assert_eq!(at(0), "1970-01-01T00-00-00Z");
    assert_eq!(at(951_782_400), "2000-02-29T00-00-00Z");
    assert_eq!(at(1_709_211_959), "2024-02-29T13-05-59Z");
    assert_eq!(at(4_107_542_400), "2100-03-01T00-00-00Z");
}

/// The documents and the CPU's records of this repository.
fn copy_documents(root: &Path) {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    for folder in ["docs", "benches/record/cpu"] {
        fs::create_dir_all(root.join(folder)).unwrap();
    }
    for document in ["README.md", "docs/kernels.md"] {
        fs::copy(here.join(document), root.join(document)).unwrap();
    }
    for record in fs::read_dir(here.join("benches/record/cpu")).unwrap().map(|file| file.unwrap()) {
        let copied = root.join("benches/record/cpu").join(record.file_name());
        fs::copy(record.path(), copied).unwrap();
    }
}

/// A made-up record of a GPU, ours as benches write it.
fn record_of_a_gpu(folder: &Path) {
    fs::create_dir(folder).unwrap();
    let named = |op: &str, direction: &str, shape: &str, batch, took_us| {
        let (mut row, peaks) = row(op, 1, Some(Cost { bytes: 8_000_000, flops: 600_000_000 }));
        (row.direction, row.shape, row.batch) = (direction.into(), shape.into(), batch);
        (row.precision, row.took) = ("bf16", Duration::from_micros(took_us));
        (row, peaks)
    };
    let mut rows = vec![
        named("attention", "forward", "vit_b encoder", 2048, 200),
        named("layer_norm", "forward", "vit_b encoder", 4096, 2),
        named("adamw", "update", "vit_b", 111, 1000),
    ];
    for stack in ["encoder", "decoder"] {
        for layer in ["qkv", "proj", "fc1", "fc2"] {
            let shape = format!("vit_b {stack} {layer}");
            let took_us = if layer == "proj" { 2 } else { 1 };
            rows.push(named("linear", "forward", &shape, 4096, took_us));
            rows.push(named("linear", "backward", &shape, 4096, took_us));
        }
    }
    let environment = vec![("pixmim", "0.1.0 (git abc)".into()), ("device", "GPU X".into())];
    let report = Report { environment, rows };
    let write = |name: &str, text: &str| fs::write(folder.join(name), text).unwrap();
    write("2030-01-02-abc-speed.csv", &report.record());
    // An older one, of which nothing may be shown.
    write("2029-01-02-abc-speed.csv", &report.record().replace("GPU X", "GPU OLD"));
    write(
        "2030-01-02-abc-steps.csv",
        "size,precision,batch,micro_batch,images_per_s,ms_per_step,device,commit,products\n\
         vit_b,bf16,1024,1024,9999,102.4,GPU_X,abc,default\n\
         vit_b,bf16,4096,1024,8000,512,GPU_X,abc,default\n\
         vit_b,bf16,4096,1024,9999,409.6,GPU_X,abc,timed+bias\n",
    );
    write(
        "2030-01-02-abc-peers.csv",
        "# pytorch: 9.9\nop,direction,shape,batch,precision,variant,ms,tflop_per_s\n\
         train,step,vit_b,2048,bf16,eager,1024,\ntrain,step,vit_b,4096,bf16,compile,1024,\n\
         attention,forward,vit_b encoder,4096,bf16,flash,1.0,\n\
         attention,forward,vit_b encoder,4096,bf16,math,3.0,\n",
    );
}

#[test]
fn tables_are_of_the_newest_records_and_of_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    copy_documents(root);
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/readme-tables");
    let run = |option: Option<&str>| {
        let mut command = Command::new("python3");
        command.arg(&script).arg("--root").arg(root).args(option);
        command.output().unwrap()
    };
    let read = |document: &str| fs::read_to_string(root.join(document)).unwrap();
    assert!(run(None).status.success());
    let before = read("README.md");
    assert!(before.contains("<!-- gpu-speed -->\n<!-- /gpu-speed -->"), "a table without a record");
    record_of_a_gpu(&root.join("benches/record/gpu"));
    let stale = run(Some("--check"));
    assert_eq!(stale.status.code(), Some(1));
    let said = String::from_utf8(stale.stderr).unwrap();
    assert!(said.contains("README.md (gpu-speed), docs/kernels.md (gpu-ops): not what"), "{said}");
    assert_eq!(read("README.md"), before, "a check writes nothing");

    assert!(run(None).status.success());
    assert!(run(Some("--check")).status.success());
    let readme = read("README.md");
    for line in [
        "GPU X, bf16, one run; ours 0.1.0 (git abc), PyTorch 9.9.",
        // 4096 images in 512 ms; eager would take twice the time of compile.
        "| PixMIM ViT-B/16, whole step | 9000 images/s | 8000 images/s | 4000 images/s (compile) | 2.00 |",
        // 200 us for half of the images.
        "| attention (50, 64) forward | 0.36 ms | 0.4 ms (timed with 2048 images) | 1 ms (flash) | 2.50 |",
        // 8 MB in 2 us.
        "| layer_norm forward, width 768 | 3.7 TB/s | 4 TB/s |  |  |",
        // 0.8 ms at 10 GB/s.
        "| adamw | 90 % of a copy | 80 % of a copy |  |  |",
        // 600 MFLOP in 1 us, but for one of four layers that takes twice as long.
        "| linear, all layers of a ViT-B step | 680 TFLOP/s | 480 TFLOP/s |  |  |",
        "| linear, slowest of them | 600 TFLOP/s | 300 TFLOP/s |  |  |",
        "benches/record/gpu/2030-01-02-abc-peers.csv",
    ] {
        assert!(readme.contains(line), "{line} is not in\n{readme}");
    }
    assert!(!readme.contains("GPU OLD") && !readme.contains("9999"));
    let kernels = read("docs/kernels.md");
    let line = "| `adamw` update bf16 | vit_b | 111 | 1.000 | 8.000 | 0.6000 | 80 % of memory |";
    assert!(kernels.contains(line), "{kernels}");
    assert!(kernels.contains("](../benches/record/gpu/2030-01-02-abc-speed.csv)"), "{kernels}");

    // And what a record gave goes with it.
    fs::remove_dir_all(root.join("benches/record/gpu")).unwrap();
    assert!(run(None).status.success());
    assert_eq!(read("README.md"), before);
}
