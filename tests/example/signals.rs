//! SIGINT and SIGTERM at any moment save the last finished step; a second SIGINT ends at once.

use std::fs;
use std::process::Command;
use std::thread::sleep;
use std::time::Duration;

use tempfile::TempDir;

use crate::{
    Running, checkpoints, clean, folder, metrics_of, program, random, small, succeed, value,
};

/// Checks that a run that a signal ended left what is needed to go on, and that it does go on.
fn assert_stopped(running: Running, folder: &TempDir, steps_more: u64) -> u64 {
    let (status, last, said) = running.end();
    assert_eq!(status.code(), Some(0), "{said}");
    assert!(last.starts_with("stopped steps="), "{said}");
    let step: u64 = value(&last, "steps").parse().unwrap();
    assert!(last.contains(" report=run/report.html resume with: "), "{last}");
    assert!(last.ends_with(" --resume run"), "{last}");
    let run = folder.path().join("run");
    assert_eq!(checkpoints(&run).last(), Some(&step), "{said}");
    assert_eq!(metrics_of(&run).len() as u64, step);
    let report = fs::read_to_string(run.join("report.html")).unwrap();
    assert!(report.contains("interrupted; --resume auto goes on"), "the report says so");

    let steps = step + steps_more;
    if steps == 0 {
        // Stopped before its first step; a run of none is refused.
        return step;
    }
    let mut goes_on = clean(Command::new(program()), folder.path());
    goes_on.args(["--resume", "run", "--steps", &steps.to_string()]);
    assert!(succeed(goes_on).starts_with(&format!("done steps={steps} ")));
    step
}

#[test]
fn signals_at_named_moments_save_and_exit_with_0() {
    for (signal, after, setting) in [
        ("INT", "pixmim ", "log.picture_every=0"),
        ("TERM", "picture=run/viz/step-00000000.png", "log.picture_every=0"),
        ("INT", "step=1 ", "log.picture_every=0"),
        ("TERM", "step=7 ", "log.checkpoint_every=1"),
        ("TERM", "picture=run/viz/step-00000003.png", "log.picture_every=1"),
        ("INT", "checkpoint=run/ckpt/step-00000002", "log.checkpoint_every=1"),
    ] {
        let folder = folder();
        let arguments = format!("--steps 1000000 --out run --set {setting}");
        let mut running = Running::start(small(&folder, &arguments));
        running.wait_for(after);
        running.signal(signal);
        assert_stopped(running, &folder, 2);
    }
}

#[test]
fn signals_at_random_moments_save_and_exit_with_0() {
    let folder = folder();
    let run = folder.path().join("run");
    let mut step = 0;
    for i in 0..8 {
        let arguments = "--steps 1000000 --out run --resume auto --set log.picture_every=5 \
                         --set log.checkpoint_every=3";
        let mut running = Running::start(small(&folder, arguments));
        running.wait_for("pixmim ");
        sleep(Duration::from_micros(random(1, i, 120_000)));
        running.signal(if i % 2 == 0 { "INT" } else { "TERM" });
        let stopped = assert_stopped(running, &folder, 0);
        assert!(stopped >= step, "{stopped} after {step}");
        step = stopped;
    }
    assert_eq!(
        metrics_of(&run).iter().map(|r| r.step).collect::<Vec<_>>(),
        Vec::from_iter(1..=step)
    );
}

/// A picture that takes long to decode, under many names.
fn slow_photos(folder: &TempDir) {
    const SIDE: u32 = 3000;
    let photos = folder.path().join("slow");
    fs::create_dir(&photos).unwrap();
    let first = photos.join("0.png");
    let mut encoder = png::Encoder::new(fs::File::create(&first).unwrap(), SIDE, SIDE);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_compression(png::Compression::Fast);
    let row = |y: u32| (0..3 * SIDE).map(move |x| (x / 5 + y / 3) as u8);
    let pixels: Vec<u8> = (0..SIDE).flat_map(row).collect();
    encoder.write_header().unwrap().write_image_data(&pixels).unwrap();
    for i in 1..64 {
        fs::hard_link(&first, photos.join(format!("{i}.png"))).unwrap();
    }
}

#[test]
fn a_signal_while_waiting_for_data_saves_and_exits_with_0() {
    let folder = folder();
    slow_photos(&folder);
    let arguments = "--data slow --steps 2 --out run --set data.threads=1 --set data.cache_mib=0 \
                     --set optim.global_batch=64 --set optim.micro_batch=64 --set log.picture_images=1";
    for signal in ["INT", "TERM"] {
        let arguments = format!("{arguments} --resume auto");
        let mut running = Running::start(small(&folder, &arguments));
        running.wait_for("picture=");
        // 64 images take seconds.
        sleep(Duration::from_millis(100));
        running.signal(signal);
        let (status, last, said) = running.end();
        assert_eq!(status.code(), Some(0), "{said}");
        assert!(last.starts_with("stopped steps=0 loss=NaN images_per_s=0 report="), "{said}");
        assert_eq!(checkpoints(&folder.path().join("run")), [0]);
    }
}

#[test]
fn a_second_interrupt_ends_at_once_with_130() {
    let folder = folder();
    // One step of 4096 patches an image takes seconds, and is not cut short by the first signal.
    let arguments = "--steps 9 --out run --set model.image_size=512 --set model.patch_size=8 \
                     --set model.dim=96 --set model.decoder_dim=64 --set optim.global_batch=16 \
                     --set optim.micro_batch=16 --set log.picture_images=1 --set data.threads=2";
    let mut running = Running::start(small(&folder, arguments));
    running.wait_for("picture=");
    sleep(Duration::from_millis(400));
    running.signal("INT");
    sleep(Duration::from_millis(100));
    running.signal("INT");
    let (status, _, said) = running.end();
    assert_eq!(status.code(), Some(130), "{said}");
    assert!(!said.contains("stopped"), "{said}");
    // The run can be started again.
    assert_eq!(checkpoints(&folder.path().join("run")), Vec::<u64>::new());
}
