//! A long run needs no more memory than a short one.
#![cfg(target_os = "linux")]

use std::fs;

use crate::{Running, folder, small};

/// Resident memory of a process without its pages of files, in KiB.
fn resident(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().strip_suffix(" kB").unwrap().trim().parse().unwrap()
}

/// Memory of a run that says `early` at some time and `late` much later.
fn assert_constant(arguments: &str, early: &str, late: &str) {
    let folder = folder();
    let arguments = format!("--steps 100000 --out run --set optim.global_batch=16 {arguments}");
    let mut command = small(&folder, &arguments);
    // What glibc keeps for each thread depends on which thread happened to draw a picture.
    command.env("MALLOC_ARENA_MAX", "1");
    let mut running = Running::start(command);
    let [before, after] = [early, late].map(|moment| {
        running.wait_for(moment);
        resident(running.child.id()) as f64
    });
    assert!(after <= 1.02 * before, "{before} KiB at {early:?}, {after} at {late:?}");
}

#[test]
fn steps_and_pictures_do_not_add_up_in_memory() {
    let settings = "--set log.checkpoint_every=0 --set log.picture_every=20";
    assert_constant(settings, "step=410 ", "step=1610 ");
}

/// Without logged steps, as the report is as long as the list of them.
#[test]
fn checkpoints_do_not_add_up_in_memory() {
    let settings =
        "--set log.checkpoint_every=10 --set log.picture_every=0 --set log.every=1000000";
    let [early, late] = [200, 1000].map(|step| format!("checkpoint=run/ckpt/step-{step:08}"));
    assert_constant(settings, &early, &late);
}
