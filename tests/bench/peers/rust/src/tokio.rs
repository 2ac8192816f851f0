// tokio's side of the benchmarks: CancellationToken, TaskTracker, signals and timers. What it answers to
// is written in ../../peer.hpp.
mod harness;

use harness::{latency, now, per_operation, pinned, raise_sigterm, settle};
use std::future::Future;
use std::hint::black_box;
use std::pin::pin;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{mpsc, Arc, OnceLock};
use std::task::{Context, Wake, Waker};
use std::time::Duration;
use tokio::runtime::{Builder, Runtime};
use tokio::signal::unix::{signal, SignalKind};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

const NODES: usize = 1_000_000;
const DEADLINES: usize = 100_000;

// As many workers as there are processors; one where the process may use one.
fn runtime() -> Runtime {
    Builder::new_multi_thread().enable_all().build().expect("a runtime")
}

fn current_thread_runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().expect("a runtime")
}

struct Asleep;
impl Wake for Asleep {
    fn wake(self: Arc<Self>) {}
}

// ---- trees ----

fn chain(depth: usize) -> Vec<CancellationToken> {
    let mut all = vec![CancellationToken::new()];
    while all.len() < depth {
        all.push(all[all.len() - 1].child_token());
    }
    all
}

fn wide() -> Vec<CancellationToken> {
    let mut all = Vec::with_capacity(NODES + 1);
    all.push(CancellationToken::new());
    for _ in 0..NODES {
        all.push(all[0].child_token());
    }
    all
}

fn per_node(body: impl FnOnce()) -> f64 {
    let begin = std::time::Instant::now();
    body();
    begin.elapsed().as_nanos() as f64 / NODES as f64
}

fn check(depth: usize, threads: usize, seconds: f64) -> f64 {
    let tokens = chain(depth);
    let token = &tokens[depth - 1];
    per_operation(threads, seconds, |operations| {
        for _ in 0..operations {
            black_box(token.is_cancelled());
        }
    })
}

fn child(threads: usize, seconds: f64) -> f64 {
    let parent = CancellationToken::new();
    per_operation(threads, seconds, |operations| {
        for _ in 0..operations {
            black_box(parent.child_token());
        }
    })
}

// The nearest thing to a callback: a future that waits, polled once so that it is registered.
fn callback(threads: usize, seconds: f64) -> f64 {
    let token = CancellationToken::new();
    let waker = Waker::from(Arc::new(Asleep));
    per_operation(threads, seconds, |operations| {
        let mut context = Context::from_waker(&waker);
        for _ in 0..operations {
            let waiting = pin!(token.cancelled());
            black_box(waiting.poll(&mut context).is_ready());
        }
    })
}

fn cancel(tree: Vec<CancellationToken>) -> f64 {
    let figure = per_node(|| tree[0].cancel());
    assert!(tree[NODES - 1].is_cancelled());
    figure
}

fn destroy(tree: Vec<CancellationToken>) -> f64 {
    tree[0].cancel();
    per_node(|| drop(tree))
}

fn resident_bytes() -> f64 {
    let text = std::fs::read_to_string("/proc/self/smaps_rollup").unwrap_or_default();
    let line = text.lines().find(|line| line.starts_with("Rss:")).unwrap_or("Rss: 0 kB");
    line.split_whitespace().nth(1).and_then(|word| word.parse::<f64>().ok()).unwrap_or(0.0) * 1024.0
}

fn bytes_of_child() -> f64 {
    let parent = CancellationToken::new();
    let before = resident_bytes();
    let all: Vec<_> = (0..NODES).map(|_| parent.child_token()).collect();
    let figure = (resident_bytes() - before) / all.len() as f64;
    // The tree is not needed any more, and taking it apart is another case.
    std::mem::forget(all);
    figure
}

// What earlier cases have left in the heap is not to be counted.
fn in_process_of_its_own(case: &str) -> Option<f64> {
    let program = std::env::current_exe().ok()?;
    let output = std::process::Command::new(program).arg(case).output().ok()?;
    String::from_utf8_lossy(&output.stdout).trim().parse().ok()
}

// ---- groups, signals, deadlines ----

fn guard(threads: usize, seconds: f64) -> f64 {
    let tracker = TaskTracker::new();
    let _one_stays = tracker.token();
    per_operation(threads, seconds, |operations| {
        for _ in 0..operations {
            drop(black_box(tracker.token()));
        }
    })
}

// The waiter is a thread of its own, as the runtime's own thread is the one that leaves.
fn last_out(seconds: f64) -> f64 {
    latency(seconds, || {
        let tracker = TaskTracker::new();
        let token = tracker.token();
        tracker.close();
        let waiting = tracker.clone();
        let (woken, when) = mpsc::channel();
        let waiter = std::thread::spawn(move || {
            current_thread_runtime().block_on(waiting.wait());
            woken.send(now()).expect("somebody listens");
        });
        settle();
        let begin = now();
        drop(token);
        let took = when.recv().expect("the waiter was here") - begin;
        waiter.join().expect("it ended well");
        took
    })
}

// A task listens for the signal and cancels the token; the worker is a task that waits for the token.
fn cancel_when_signalled(runtime: &Runtime, token: CancellationToken) {
    let _inside = runtime.enter();
    let mut terminated = signal(SignalKind::terminate()).expect("a signal's stream");
    runtime.spawn(async move {
        terminated.recv().await;
        token.cancel();
    });
}

fn signalled(seconds: f64) -> f64 {
    let runtime = runtime();
    let (woken, when) = mpsc::channel();
    latency(seconds, || {
        let token = CancellationToken::new();
        cancel_when_signalled(&runtime, token.clone());
        let woken = woken.clone();
        runtime.spawn(async move {
            token.cancelled().await;
            woken.send(now()).expect("somebody listens");
        });
        settle();
        let begin = now();
        raise_sigterm();
        when.recv().expect("the worker was here") - begin
    })
}

// A child, and a timer that would cancel it: registered, then both are dropped.
fn deadline(threads: usize, seconds: f64) -> f64 {
    let runtime = runtime();
    let parent = CancellationToken::new();
    let waker = Waker::from(Arc::new(Asleep));
    let far = Instant::now() + Duration::from_secs(3600);
    per_operation(threads, seconds, |operations| {
        let _inside = runtime.enter();
        let mut context = Context::from_waker(&waker);
        for _ in 0..operations {
            let child = parent.child_token();
            let timer = pin!(tokio::time::sleep_until(far));
            black_box(timer.poll(&mut context).is_ready());
            child.cancel();
        }
    })
}

fn cpu_milliseconds() -> f64 {
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    unsafe { libc::getrusage(libc::RUSAGE_SELF, &mut usage) };
    let of = |time: libc::timeval| time.tv_sec as f64 * 1e3 + time.tv_usec as f64 / 1e3;
    of(usage.ru_utime) + of(usage.ru_stime)
}

struct Fired {
    cpu_milliseconds: f64,
    late_milliseconds: f64,
}

fn fire_deadlines() -> Fired {
    let runtime = runtime();
    let parent = CancellationToken::new();
    let lateness: Arc<Vec<AtomicI64>> = Arc::new((0..DEADLINES).map(|_| AtomicI64::new(0)).collect());
    let before = cpu_milliseconds();
    let first = Instant::now() + Duration::from_millis(300);
    let tracker = TaskTracker::new();
    for i in 0..DEADLINES {
        let due = first + Duration::from_micros(i as u64 * 1_000_000 / DEADLINES as u64);
        let child = parent.child_token();
        let lateness = lateness.clone();
        tracker.spawn_on(
            async move {
                tokio::time::sleep_until(due).await;
                child.cancel();
                lateness[i].store(due.elapsed().as_nanos() as i64, Ordering::Relaxed);
            },
            runtime.handle(),
        );
    }
    tracker.close();
    runtime.block_on(tracker.wait());
    let cpu_milliseconds = cpu_milliseconds() - before;
    let mut late: Vec<i64> = lateness.iter().map(|one| one.load(Ordering::Relaxed)).collect();
    late.sort_unstable();
    Fired { cpu_milliseconds, late_milliseconds: late[DEADLINES * 99 / 100] as f64 / 1e6 }
}

static LAST_FIRED: OnceLock<f64> = OnceLock::new();

fn run(case: &str, threads: usize, seconds: f64) -> Option<f64> {
    Some(match case {
        "check" => check(1, threads, seconds),
        "check8" => check(8, threads, seconds),
        "child" => child(threads, seconds),
        "callback" => callback(threads, seconds),
        "cancel_wide" => cancel(wide()),
        "cancel_deep" => cancel(chain(NODES)),
        "destroy_wide" => destroy(wide()),
        "destroy_deep" => destroy(chain(NODES)),
        "bytes_child" => in_process_of_its_own(case)?,
        "guard" => guard(threads, seconds),
        "last_out" => pinned(|| last_out(seconds)),
        "signal" => pinned(|| signalled(seconds)),
        "signal_two" => signalled(seconds),
        "deadline" => deadline(threads, seconds),
        "deadlines_fire" => {
            let fired = fire_deadlines();
            let _ = LAST_FIRED.set(fired.late_milliseconds);
            fired.cpu_milliseconds
        }
        "deadlines_late" => *LAST_FIRED.get_or_init(|| fire_deadlines().late_milliseconds),
        _ => return None,
    })
}

// ---- whole processes ----

// Waits for SIGTERM with so many tasks, then sees them out.
fn serve(waiters: usize) {
    runtime().block_on(async {
        let token = CancellationToken::new();
        let tracker = TaskTracker::new();
        let mut terminated = signal(SignalKind::terminate()).expect("a signal's stream");
        for _ in 0..waiters {
            tracker.spawn(token.clone().cancelled_owned());
        }
        println!("ready");
        terminated.recv().await;
        token.cancel();
        tracker.close();
        tracker.wait().await;
    });
}

// For each SIGTERM: when a task that waits for the token runs.
fn wait_for_signals() {
    let runtime = runtime();
    loop {
        let token = CancellationToken::new();
        cancel_when_signalled(&runtime, token.clone());
        let worker = runtime.spawn(async move {
            token.cancelled().await;
            now()
        });
        println!("ready");
        println!("{}", runtime.block_on(worker).expect("the worker was here"));
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["serve", waiters] => serve(waiters.parse().unwrap_or(0)),
        ["await"] => wait_for_signals(),
        ["bytes_child"] => println!("{:.3}", bytes_of_child()),
        _ => harness::answer("tokio", env!("PEER_TOKIO_VERSION"), run),
    }
}
