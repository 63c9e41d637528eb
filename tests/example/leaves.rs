//! What a run says and leaves, read back.

use std::fs;
use std::io::BufReader;
use std::path::Path;

use pixmim::train::config::Config;
use pixmim::train::timeline;

use crate::{
    PHOTOS, checkpoints, clean, finish, folder, metrics_of, program, small, succeed, value,
};

#[test]
fn a_run_leaves_what_it_promises() {
    let folder = folder();
    let arguments = "--steps 9 --out run --set log.every=2 --set log.picture_every=4 \
                     --set log.checkpoint_every=4 --set optim.lr=2e-3";
    let (output, stdout, stderr) = finish(small(&folder, arguments));
    assert_eq!(output.status.code(), Some(0), "{stderr}");
    assert_eq!(stderr, "");
    let run = folder.path().join("run");
    let loss = says(&stdout);
    config(&run);
    journals(&run);
    events(&run);
    pictures(&run);
    report(&run, loss);
    // Those before are deleted: two are kept.
    assert_eq!(checkpoints(&run), [8, 9]);
    assert_eq!(fs::read_to_string(run.join("ckpt/LATEST")).unwrap(), "step-00000009\n");
    let mut names: Vec<_> = fs::read_dir(&run)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| !name.starts_with("events.out.tfevents."))
        .collect();
    names.sort();
    let expected = [
        "bad_images.jsonl",
        "ckpt",
        "config.toml",
        "metrics.jsonl",
        "notices.jsonl",
        "report.html",
        "timeline.png",
        "viz",
    ];
    assert_eq!(names, expected);
}

/// The lines of a run off a terminal. Returns the final loss as it is written.
fn says(stdout: &str) -> &str {
    assert!(!stdout.contains(['\r', '\u{1b}']), "{stdout:?}");
    let lines: Vec<&str> = stdout.lines().collect();
    let starts = |line: usize, start: &str| {
        assert!(lines[line].starts_with(start), "line {line} is {:?}", lines[line]);
    };
    starts(0, "pixmim 0.");
    assert!(lines[0].contains("| small, pixmim: ") && lines[0].contains(" --steps 9 "));
    starts(1, "device    cpu");
    assert!(lines[1].contains("2 threads, f32 products"));
    starts(2, "peak      ");
    assert!(
        lines[2].contains(" TFLOP/s in a product of 1024 x 1024, measured in "),
        "{}",
        lines[2]
    );
    assert_eq!(lines[3], "batch     global 8 = 2 x 4 micro; lr 2.000e-3 as given");
    assert_eq!(lines[4], "lr        2.000e-03 at its peak");
    assert_eq!(lines[5], format!("data      64 images: {PHOTOS}"));
    starts(6, "model     0.0 M parameters, ");
    assert_eq!(lines[7], "steps     9, 8 in an epoch");
    assert_eq!(lines[8], "run       run");
    assert_eq!(lines[9], "resume    no, from the first step");
    let rest = &lines[10..];
    let begun =
        |start: &'static str| rest.iter().filter(move |line| line.starts_with(start)).copied();
    let pictures = [0, 4, 8, 9].map(|step| format!("picture=run/viz/step-{step:08}.png"));
    assert!(begun("picture=").eq(pictures.iter().map(String::as_str)));
    let checkpoints = [4, 8, 9].map(|step| format!("checkpoint=run/ckpt/step-{step:08}"));
    assert!(begun("checkpoint=").eq(checkpoints.iter().map(String::as_str)));
    let steps: Vec<&str> = begun("step=").collect();
    assert_eq!(
        steps.iter().map(|line| value(line, "step")).collect::<Vec<_>>(),
        ["2", "4", "6", "8", "9"]
    );
    for line in &steps {
        let keys =
            ["step", "epoch", "loss", "ema", "lr", "gnorm", "images_per_s", "mfu", "data", "eta"];
        assert!(line.split(' ').map(|pair| pair.split_once('=').unwrap().0).eq(keys), "{line}");
        assert!(keys.iter().all(|key| value(line, key).parse::<f64>().unwrap().is_finite()));
    }
    assert_eq!(value(steps[3], "epoch"), "1.00");
    assert_eq!(rest.len(), pictures.len() + checkpoints.len() + steps.len() + 1, "{stdout}");

    let last = *rest.last().unwrap();
    let loss = value(last, "loss");
    assert!(value(last, "images_per_s").parse::<u64>().unwrap() > 0, "{last}");
    let speed = value(last, "images_per_s");
    let done = format!("done steps=9 loss={loss} images_per_s={speed} report=run/report.html");
    assert_eq!(last, done);
    assert_eq!(loss, value(steps[4], "ema"));
    loss
}

fn config(run: &Path) {
    let path = run.join("config.toml");
    let config = Config::load(&path).unwrap();
    assert_eq!(config.to_toml().unwrap(), fs::read_to_string(&path).unwrap());
    assert_eq!(config.data.path, Path::new(PHOTOS));
    assert_eq!(config.log.out, Path::new("run"));
    let demo = Config::preset("demo").unwrap();
    assert_eq!(config.method, demo.method);
    assert_eq!((config.model.dim, config.model.mlp_ratio), (24, demo.model.mlp_ratio));
    assert_eq!((config.optim.lr, config.optim.base_lr), (Some(2e-3), None));
    assert_eq!((config.schedule.steps, config.schedule.epochs), (Some(9), None));
}

fn journals(run: &Path) {
    let lines = |file: &str| -> Vec<serde_json::Map<String, serde_json::Value>> {
        let text = fs::read_to_string(run.join(file)).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let metrics = lines("metrics.jsonl");
    assert_eq!(metrics[0]["schema"], "pixmim-metrics-1");
    assert_eq!(metrics[0]["run"], "small, pixmim");
    let steps: Vec<_> = metrics[1..].iter().map(|line| line["step"].as_u64().unwrap()).collect();
    assert_eq!(steps, [2, 4, 6, 8, 9]);
    for line in &metrics[1..] {
        let measured = ["images_per_s", "data_wait", "tflop_per_s", "mfu"];
        let keys = [&["step", "epoch", "loss", "lr", "grad_norm"], &measured[..]].concat();
        assert!(keys.iter().all(|key| line[*key].is_number()), "{line:?}");
        assert_eq!(line.len(), keys.len());
        let number = |key: &str| line[key].as_f64().unwrap();
        assert!(number("loss") > 0.1 && number("loss") < 10.0, "{line:?}");
        assert!(number("grad_norm") > 0.0 && number("images_per_s") > 0.0, "{line:?}");
        assert!((0.0..=1.0).contains(&number("data_wait")), "{line:?}");
        assert!(number("tflop_per_s") > 0.0 && number("mfu") > 0.0, "{line:?}");
        // Of one peak.
        let ratio = |line: &serde_json::Map<String, serde_json::Value>| {
            line["mfu"].as_f64().unwrap() / line["tflop_per_s"].as_f64().unwrap()
        };
        assert!((ratio(line) / ratio(&metrics[1]) - 1.0).abs() <= 1e-9, "{line:?}");
        assert_eq!(number("epoch"), number("step") / 8.0);
    }
    // The warm-up of 60 updates rises from 0: the first update is made at 0.
    assert!((metrics[1]["lr"].as_f64().unwrap() - 2e-3 / 60.0).abs() <= 1e-12);
    for (file, schema) in
        [("bad_images.jsonl", "pixmim-bad-images-1"), ("notices.jsonl", "pixmim-notices-1")]
    {
        let lines = lines(file);
        assert_eq!((lines.len(), &lines[0]["schema"]), (1, &schema.into()), "{file}");
    }
}

/// One TensorBoard file, whose records are framed and whose curves and pictures are there.
fn events(run: &Path) {
    let entries = fs::read_dir(run).unwrap().map(|entry| entry.unwrap());
    let files: Vec<_> = entries
        .filter(|e| e.file_name().to_string_lossy().starts_with("events.out.tfevents."))
        .map(|e| fs::read(e.path()).unwrap())
        .collect();
    let [file] = &files[..] else { panic!("{} event files", files.len()) };
    let masked = |bytes: &[u8]| crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8);
    let (mut rest, mut events) = (&file[..], Vec::new());
    while !rest.is_empty() {
        let word = |at: usize| u32::from_le_bytes(rest[at..at + 4].try_into().unwrap());
        let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
        assert_eq!(word(8), masked(&rest[..8]));
        events.push(&rest[12..12 + length]);
        assert_eq!(word(12 + length), masked(&rest[12..12 + length]));
        rest = &rest[16 + length..];
    }
    let holding = |tag: &str| {
        let holds = |event: &&&[u8]| event.windows(tag.len()).any(|part| part == tag.as_bytes());
        events.iter().filter(holds).count()
    };
    for tag in ["train/loss", "train/lr", "train/grad_norm", "speed/images_per_s", "speed/mfu"] {
        assert_eq!(holding(tag), 5, "{tag}");
    }
    assert_eq!(holding("picture/psnr"), 4);
    assert_eq!(holding("IHDR"), 4, "pictures");
}

/// The pictures decode, are of the size that their parts need, and are not blank.
fn pictures(run: &Path) {
    let saved = timeline::list(&run.join("viz")).unwrap();
    assert_eq!(saved.iter().map(|picture| picture.step).collect::<Vec<_>>(), [0, 4, 8, 9]);
    let mut seen = Vec::new();
    for picture in &saved {
        let (width, height, pixels) = decode(&picture.path);
        // Six columns of images shown at least 128 pixels wide, two rows of them, room for words.
        assert!((6 * 128..2000).contains(&width), "{width}");
        assert!((2 * 128..2000).contains(&height), "{height}");
        let mut colours: Vec<_> = pixels.chunks_exact(3).collect();
        colours.sort_unstable();
        colours.dedup();
        assert!(colours.len() > 500, "{} colours", colours.len());
        assert!(picture.scores.prediction.is_finite());
        seen.push((width, height, pixels));
    }
    assert_eq!((seen[0].0, seen[0].1), (seen[3].0, seen[3].1));
    assert!(seen[0].2 != seen[3].2, "the network changed");
    let (width, height, _) = decode(&run.join("timeline.png"));
    assert!(width > 128 && height > 128);
}

fn decode(path: &Path) -> (usize, usize, Vec<u8>) {
    let file = BufReader::new(fs::File::open(path).unwrap());
    let mut reader = png::Decoder::new(file).read_info().unwrap();
    let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
    let info = reader.next_frame(&mut pixels).unwrap();
    assert_eq!((info.color_type, info.bit_depth), (png::ColorType::Rgb, png::BitDepth::Eight));
    assert_eq!(pixels.len(), 3 * (info.width * info.height) as usize);
    (info.width as usize, info.height as usize, pixels)
}

/// The report needs nothing but itself, and says what the last line said.
fn report(run: &Path, loss: &str) {
    let page = fs::read_to_string(run.join("report.html")).unwrap();
    for outside in ["<script", "<link", "<iframe", "@import", "url(", "href="] {
        assert!(!page.contains(outside), "{outside}");
    }
    let sources = page.split("src=").skip(1);
    assert!(sources.clone().all(|rest| rest.starts_with("\"data:image/png;base64,")));
    // At least the timeline and the last picture.
    assert!(sources.count() >= 2);
    for word in ["step 9 of 9", "finished", loss, "global 8 = 2 x 4 micro", "64 images", "<svg"] {
        assert!(page.contains(word), "{word}");
    }
    let config = fs::read_to_string(run.join("config.toml")).unwrap();
    assert!(config.lines().filter(|line| line.starts_with("mask_ratio")).all(|l| page.contains(l)));
}

#[test]
fn a_dry_run_tells_speed_memory_and_time_and_leaves_nothing() {
    let folder = folder();
    let before = crate::tree(folder.path());
    for out in ["", "--out run"] {
        let (output, stdout, stderr) =
            finish(small(&folder, &format!("--steps 5000 --dry-run {out}")));
        assert_eq!(output.status.code(), Some(0), "{stderr}");
        for start in [
            "device ",
            "peak ",
            "batch ",
            "lr ",
            "data ",
            "model ",
            "steps ",
            "images/s ",
            "products ",
            "time ",
        ] {
            assert!(stdout.lines().any(|line| line.starts_with(start)), "{start} in {stdout}");
        }
        assert!(stdout.contains("for 5000 steps"), "{stdout}");
        assert!(!stdout.lines().any(|line| line.starts_with("run ")), "{stdout}");
        assert_eq!(stdout.lines().last(), Some("dry run   nothing was written"));
        assert_eq!(crate::tree(folder.path()), before);
    }
}

#[test]
fn a_run_of_one_step_and_one_that_is_finished_have_numbers_in_the_last_line() {
    let folder = folder();
    let last = succeed(small(&folder, "--steps 1 --out run"));
    assert!(value(&last, "images_per_s").parse::<u64>().unwrap() > 0, "{last}");
    let mut again = clean(std::process::Command::new(program()), folder.path());
    again.args(["--resume", "--out", "run"]);
    let last = succeed(again);
    assert!(last.starts_with("done steps=1 loss="), "{last}");
    assert!(last.ends_with(" images_per_s=0 report=run/report.html"), "{last}");
}

/// A prediction of nothing scores 0.99: below that, the network has learned something of the photos.
#[test]
fn the_network_learns_from_the_photos() {
    let folder = folder();
    let arguments = "--steps 60 --out run --set model.image_size=32 --set model.patch_size=8 \
                     --set model.dim=64 --set model.heads=2 --set optim.global_batch=32 \
                     --set optim.micro_batch=32 --set optim.lr=6e-3 --set schedule.warmup=5it";
    let last = succeed(small(&folder, arguments));
    let losses: Vec<f64> =
        metrics_of(&folder.path().join("run")).iter().map(|record| record.loss).collect();
    let smoothed: f64 = value(&last, "loss").parse().unwrap();
    assert!(smoothed <= 0.9 * losses[0], "from {} to {smoothed}", losses[0]);
    let end = losses[50..].iter().sum::<f64>() / 10.0;
    assert!(end <= 0.9, "{end}");
}
