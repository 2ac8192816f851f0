// signal-hook's side of the benchmarks: a thread iterates over the signals and tells a worker by a
// condition variable. What it answers to is written in ../../peer.hpp.
mod harness;

use harness::{latency, now, pinned, raise_sigterm, settle};
use signal_hook::consts::SIGTERM;
use signal_hook::iterator::Signals;
use std::sync::{mpsc, Arc, Condvar, Mutex};

#[derive(Default)]
struct Flag {
    up: Mutex<bool>,
    changed: Condvar,
}

impl Flag {
    fn raise(&self) {
        *self.up.lock().expect("nobody panics") = true;
        self.changed.notify_all();
    }
    fn wait(&self) {
        let up = self.up.lock().expect("nobody panics");
        drop(self.changed.wait_while(up, |up| !*up).expect("nobody panics"));
    }
}

// A thread that raises `flag` on the next SIGTERM, and one that says when it saw that.
fn listen(flag: &Arc<Flag>, woken: mpsc::Sender<i64>) {
    let mut signals = Signals::new([SIGTERM]).expect("a signal's iterator");
    let raised = flag.clone();
    std::thread::spawn(move || {
        signals.forever().next();
        raised.raise();
    });
    let flag = flag.clone();
    std::thread::spawn(move || {
        flag.wait();
        let _ = woken.send(now());
    });
}

fn signalled(seconds: f64) -> f64 {
    let (woken, when) = mpsc::channel();
    latency(seconds, || {
        listen(&Arc::default(), woken.clone());
        settle();
        let begin = now();
        raise_sigterm();
        when.recv().expect("the worker was here") - begin
    })
}

fn run(case: &str, _threads: usize, seconds: f64) -> Option<f64> {
    match case {
        "signal" => Some(pinned(|| signalled(seconds))),
        "signal_two" => Some(signalled(seconds)),
        _ => None,
    }
}

fn main() {
    if std::env::args().nth(1).as_deref() != Some("await") {
        return harness::answer("signal-hook", env!("PEER_SIGNAL_HOOK_VERSION"), run);
    }
    let (woken, when) = mpsc::channel();
    loop {
        listen(&Arc::default(), woken.clone());
        println!("ready");
        println!("{}", when.recv().expect("the worker was here"));
    }
}
