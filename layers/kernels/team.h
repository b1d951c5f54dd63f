/* Threads: none is started here, work is given to the OpenMP team that torch already has, through GOMP_parallel. */

typedef void (*parallel)(void (*work)(void *), void *job, unsigned threads, unsigned flags);
static parallel give_team = 0;
static int (*team_size)(void) = 0;

/* The two functions of the OpenMP library that torch has loaded. */
EXPORT void causallm_threads_with(parallel gomp_parallel, int (*omp_get_num_threads)(void)) {
    give_team = gomp_parallel;
    team_size = omp_get_num_threads;
}

static void run(void (*work)(void *), void *job, int threads) {
    if (give_team && threads > 1) give_team(work, job, (unsigned)threads, 0);
    else work(job);
}

/* No more threads than there are pieces of `grain` rows: to wake one takes as long as a few rows do. */
static int needed(int threads, long rows, long grain) {
    const long pieces = (rows + grain - 1) / grain;
    return pieces < threads ? (int)pieces : threads;
}

/* Those at work on one job, who may wait for each other. */
struct team {
    atomic_int joined, waiting, phase, size;
};

/* The number of this thread in the team, from 0; each calls it once, first. */
static int join(struct team *team) {
    atomic_store(&team->size, give_team ? team_size() : 1);
    return atomic_fetch_add(&team->joined, 1);
}

#define SPINS 1000 /* before the processor is left to a thread that may need it, some 20 to 40 us */

static void wait_for_all(struct team *team) {
    const int phase = atomic_load(&team->phase);
    if (atomic_fetch_add(&team->waiting, 1) + 1 == atomic_load(&team->size)) {
        atomic_store(&team->waiting, 0);
        atomic_fetch_add(&team->phase, 1);
        return;
    }
    for (int spins = 0; atomic_load(&team->phase) == phase; spins++) {
#if X86
        _mm_pause();
#endif
#if !defined(_WIN32)
        if (spins > SPINS) sched_yield();
#endif
    }
}
