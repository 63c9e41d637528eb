//! How `cargo bench` prints and keeps its rows.

#[path = "../benches/report.rs"]
mod report;

use std::fs;
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
