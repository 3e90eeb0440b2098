/* Mean cost of one system call, for tests/bench/kernel.py. argv[1]: a file to work on, argv[2]: CPU to stay on.
 * Answers each line "<mode> <n>" with nanoseconds: g getppid, r pread 4 KiB from the page cache, w pwrite 4 KiB.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static char block[4096];

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1e9 + t.tv_nsec;
}

static void once(char mode, int fd)
{
	switch (mode) {
	case 'g':
		syscall(SYS_getppid);
		break;
	case 'r':
		syscall(SYS_pread64, fd, block, sizeof block, 0);
		break;
	case 'w':
		syscall(SYS_pwrite64, fd, block, sizeof block, 0);
		break;
	}
}

int main(int argc, char **argv)
{
	cpu_set_t set;
	char line[64], mode;
	int fd, n;

	if (argc < 3)
		return 2;
	CPU_ZERO(&set);
	CPU_SET(atoi(argv[2]), &set);
	sched_setaffinity(0, sizeof set, &set);
	fd = open(argv[1], O_RDWR | O_CREAT, 0600);
	if (fd < 0 || pwrite(fd, block, sizeof block, 0) < 0)
		return 1;
	while (fgets(line, sizeof line, stdin)) {
		if (sscanf(line, "%c %d", &mode, &n) != 2 || n < 1)
			return 2;
		double start = now();
		for (int i = 0; i < n; i++)
			once(mode, fd);
		printf("%.2f\n", (now() - start) / n);
		fflush(stdout);
	}
	return 0;
}
