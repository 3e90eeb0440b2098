/* Connect load on loopback, for tests/bench/kernel.py. argv[1]: CPU to stay on. Prints the port it listens on, then
 * answers each line "<n> <port, 0 = own> [b = stop at the first EPERM]" with one line:
 *   ok refused blocked p50 p99 mean
 * Times are nanoseconds of connect() alone.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MAX_CONNECTS 1000000

static unsigned took[MAX_CONNECTS];

static unsigned long now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ul + t.tv_nsec;
}

static int ascending(const void *a, const void *b)
{
	unsigned x = *(const unsigned *)a, y = *(const unsigned *)b;

	return x < y ? -1 : x > y;
}

static int listen_on_loopback(struct sockaddr_in *own)
{
	socklen_t len = sizeof *own;
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);

	own->sin_family = AF_INET;
	own->sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	if (bind(fd, (void *)own, sizeof *own) || listen(fd, 128) || getsockname(fd, (void *)own, &len))
		exit(1);
	return fd;
}

/* One connect: 0 ok, 1 refused, 2 blocked. The connection is reset, so that no TIME_WAIT piles up. */
static int once(int listener, const struct sockaddr_in *to, unsigned *ns)
{
	struct linger reset = {1, 0};
	int s = socket(AF_INET, SOCK_STREAM, 0), what = 0, peer;
	unsigned long start = now();

	if (connect(s, (const void *)to, sizeof *to))
		what = errno == EPERM ? 2 : 1;
	*ns = now() - start;
	if (!what) {
		peer = accept(listener, 0, 0);
		setsockopt(s, SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
		close(s);
		close(peer);
	} else {
		close(s);
	}
	return what;
}

static void run(int listener, struct sockaddr_in to, int n, int stop)
{
	int count[3] = {0}, done = 0;
	double sum = 0;

	while (done < n && done < MAX_CONNECTS) {
		int what = once(listener, &to, &took[done]);

		sum += took[done++];
		count[what]++;
		if (stop && what == 2)
			break;
	}
	qsort(took, done, sizeof *took, ascending);
	printf("%d %d %d %u %u %.1f\n", count[0], count[1], count[2], took[done / 2], took[done * 99 / 100],
	       done ? sum / done : 0);
	fflush(stdout);
}

int main(int argc, char **argv)
{
	struct sockaddr_in own = {0}, to;
	int listener, n, port;
	char line[64], mode[8];
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(argc > 1 ? atoi(argv[1]) : 0, &set);
	sched_setaffinity(0, sizeof set, &set);
	listener = listen_on_loopback(&own);
	printf("%d\n", ntohs(own.sin_port));
	fflush(stdout);
	while (fgets(line, sizeof line, stdin)) {
		n = port = mode[0] = 0;
		sscanf(line, "%d %d %7s", &n, &port, mode);
		to = own;
		if (port)
			to.sin_port = htons(port);
		run(listener, to, n, mode[0] == 'b');
	}
	return 0;
}
