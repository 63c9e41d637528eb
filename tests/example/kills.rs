//! A run that is killed again and again ends with the same bits as one that is not.

use std::fs;
use std::thread::sleep;
use std::time::Duration;

use crate::{Running, checkpoints, folder, metrics_of, random, small, succeed, tensors};

const STEPS: u64 = 300;
const KILLS: u32 = 20;

#[test]
fn twenty_kills_at_random_moments_change_no_bit() {
    let folder = folder();
    let arguments = format!(
        "--steps {STEPS} --set log.picture_every=10 --set schedule.warmup=5it --set optim.lr=2e-3"
    );
    let [whole, run] = ["whole", "run"].map(|name| folder.path().join(name));
    succeed(small(&folder, &format!("{arguments} --set log.checkpoint_every=0 --out whole")));
    let mut killed_aside = 0;
    for kill in 0..KILLS {
        let arguments = format!("{arguments} --set log.checkpoint_every=1 --resume auto --out run");
        let mut running = Running::start(small(&folder, &arguments));
        if kill % 5 == 0 {
            // While it starts: the program, the network, the folder, the journals.
            sleep(Duration::from_micros(random(2, kill, 40_000)));
        } else {
            // Some steps later, anywhere in a step and the writing of its checkpoint.
            for _ in 0..1 + random(3, kill, 4) {
                running.wait_for("step=");
            }
            sleep(Duration::from_micros(random(4, kill, 8_000)));
        }
        running.signal("KILL");
        let (status, last, said) = running.end();
        assert_eq!(status.code(), None, "kill {kill} came too late: {said}");
        assert!(!last.starts_with("done"), "{said}");
        // Whatever is there under the name of a checkpoint is whole.
        checkpoints(&run);
        let names = fs::read_dir(run.join("ckpt")).into_iter().flatten();
        let aside = |name: &fs::DirEntry| name.file_name().to_string_lossy().starts_with(".tmp-");
        killed_aside += usize::from(names.flatten().any(|name| aside(&name)));
    }
    println!("{killed_aside} of {KILLS} kills came while a checkpoint was written");
    let arguments = format!("{arguments} --set log.checkpoint_every=0 --resume auto --out run");
    succeed(small(&folder, &arguments));

    assert!(tensors(&whole, STEPS) == tensors(&run, STEPS), "weights or moments differ");
    let state = |run: &std::path::Path| {
        fs::read_to_string(run.join(format!("ckpt/step-{STEPS:08}/state.toml"))).unwrap()
    };
    assert_eq!(state(&whole), state(&run));
    assert_eq!(metrics_of(&whole), metrics_of(&run));
    let pictures = |run: &std::path::Path| {
        let files = fs::read_dir(run.join("viz")).unwrap().map(|entry| entry.unwrap().path());
        let mut files: Vec<_> = files.map(|path| fs::read(path).unwrap()).collect();
        files.sort();
        files
    };
    assert!(pictures(&whole) == pictures(&run));
    let left = fs::read_dir(run.join("ckpt")).unwrap().count();
    assert_eq!(left, 3, "two checkpoints and LATEST: nothing of the kills is left");
}
